"""Runs: the same losses on every mesh, bitwise resume, clear refusals."""

import json
import shutil

import jax
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import config_files, data, sharding
from efficient_attn.config import ConfigError
from efficient_attn.train.check import check
from efficient_attn.train.load import load_model
from efficient_attn.train.metrics import read_metrics
from efficient_attn.train.seal import CHECKSUMS
from efficient_attn.train.trainer import run
from efficient_attn.train.watch import NonFiniteError, parse_steps

TINY = dict(
  steps=6,
  batch_size=8,
  log_every=1,
  eval_batches=2,
  checkpoint_every=3,
  model=dict(
    name='lm',
    d_model=16,
    num_layers=2,
    num_heads=4,
    pattern=('gla', 'attention'),
    mixers=dict(gla=dict(chunk_size=8)),
  ),
  data=dict(seq_len=32),
  optimizer=dict(learning_rate=0.01),
)


def tiny(**changes):
  return configs.resolve(configs.override(TINY, changes))


def losses(workdir):
  return [
    row['train/loss'] for row in read_metrics(workdir) if 'train/loss' in row
  ]


def parameters(workdir):
  _, model = load_model(workdir)
  return jax.tree.leaves(jax.tree.map(np.asarray, jax.tree.leaves(model)))


@pytest.fixture(scope='module')
def one_device(tmp_path_factory):
  """A finished run on one device."""
  workdir = tmp_path_factory.mktemp('one')
  final = run(tiny(), workdir, jax.devices()[:1])
  assert set(final) == {'loss', 'accuracy', 'bits_per_byte'}
  return workdir


def test_leaves_what_it_promises(one_device):
  names = {path.name for path in one_device.iterdir()}
  assert {'config.json', 'metrics.jsonl', 'tensorboard', 'loss.png'} <= names
  rows = read_metrics(one_device)
  train = [row for row in rows if 'train/loss' in row]
  assert [row['step'] for row in train] == [1, 2, 3, 4, 5, 6]
  assert {
    'train/grad_norm',
    'train/learning_rate',
    'train/tokens_per_second',
    'train/step_seconds',
    'train/data_seconds',
    'train/mfu',
    'train/memory_gib',
  } <= set(train[2])
  assert all(np.isfinite(value) for row in rows for value in row.values())
  saved = configs.resolve(config_files.load(str(one_device / 'config.json')))
  assert saved.model.dtype == 'float32'  # resolved, not ''


@pytest.mark.in_turn
def test_rates_count_every_token_that_is_read(tmp_path):
  task = {'data': dict(name='palindrome', options={'seq_len': 20})}
  run(tiny(steps=3, accumulate=2, **task), tmp_path, jax.devices()[:1])
  row = [r for r in read_metrics(tmp_path) if 'train/loss' in r][-1]
  tokens = row['train/tokens_per_second'] * row['train/step_seconds']
  np.testing.assert_allclose(tokens, 8 * 20, rtol=1e-6)


@pytest.mark.in_turn
def test_learns(tmp_path):
  run(tiny(**{'steps': 60, 'data.seq_len': 64}), tmp_path, jax.devices()[:1])
  assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1.5


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'mesh',
  [
    'data=2,fsdp=2,tensor=2',
    pytest.param('fsdp=2,tensor=4', marks=pytest.mark.exhaustive),
    pytest.param('data=8', marks=pytest.mark.exhaustive),
    pytest.param('data=4,fsdp=2', marks=pytest.mark.exhaustive),
    pytest.param('data=2,fsdp=4', marks=pytest.mark.exhaustive),
  ],
)
def test_every_mesh_has_the_losses_of_one_device(one_device, mesh, tmp_path):
  run(tiny(mesh=mesh), tmp_path)
  np.testing.assert_allclose(
    losses(tmp_path), losses(one_device), rtol=1e-6, atol=1e-6
  )


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'changes',
  [
    {'accumulate': 4},
    {'model.remat': 'dots'},
    pytest.param({'model.remat': 'full'}, marks=pytest.mark.exhaustive),
  ],
  ids=str,
)
def test_how_a_step_is_computed_does_not_matter(one_device, changes, tmp_path):
  run(tiny(**changes), tmp_path, jax.devices()[:1])
  np.testing.assert_allclose(losses(tmp_path), losses(one_device), rtol=2e-5)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'mesh',
  [
    'fsdp=2,tensor=2,data=2',
    pytest.param('', marks=pytest.mark.exhaustive),
  ],
)
def test_resume_is_bitwise(mesh, tmp_path):
  config = tiny(mesh=mesh, ema=0.9)
  run(config, tmp_path / 'whole')
  shutil.copytree(tmp_path / 'whole', tmp_path / 'part')
  shutil.rmtree(tmp_path / 'part' / 'checkpoints' / '6')
  run(config, tmp_path / 'part')
  whole, part = parameters(tmp_path / 'whole'), parameters(tmp_path / 'part')
  assert all((a == b).all() for a, b in zip(whole, part, strict=True))
  assert losses(tmp_path / 'whole') == losses(tmp_path / 'part')
  steps = [row['step'] for row in read_metrics(tmp_path / 'part')]
  assert steps == sorted(steps)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'changes',
  [
    {'model.pooling': 'cls'},
    pytest.param({}, marks=pytest.mark.exhaustive),
  ],
  ids=str,
)
def test_vit_on_every_mesh(changes, tmp_path):
  values = dict(
    steps=3,
    batch_size=8,
    log_every=1,
    model=dict(
      name='vit', d_model=16, num_layers=2, num_heads=4, pattern=('linear',)
    ),
    data=dict(name='digits', augment=True),
  )
  values = configs.override(values, changes)
  run(configs.resolve(values), tmp_path / 'one', jax.devices()[:1])
  values['mesh'] = 'data=2,fsdp=2,tensor=2'
  run(configs.resolve(values), tmp_path / 'eight')
  np.testing.assert_allclose(
    losses(tmp_path / 'eight'), losses(tmp_path / 'one'), rtol=1e-6, atol=1e-6
  )


@pytest.mark.in_turn
def test_resume_on_another_mesh(one_device, tmp_path):
  shutil.copytree(one_device, tmp_path / 'part')
  shutil.rmtree(tmp_path / 'part' / 'checkpoints' / '6')
  run(tiny(mesh='fsdp=4,tensor=2'), tmp_path / 'part')
  np.testing.assert_allclose(
    losses(tmp_path / 'part'), losses(one_device), rtol=1e-6, atol=1e-6
  )


def damage(path, how):
  files = [p for p in path.rglob('*') if p.is_file() and p.name != CHECKSUMS]
  largest = max(files, key=lambda p: p.stat().st_size)
  content = bytearray(largest.read_bytes())
  if how == 'truncated':
    content = content[: len(content) // 2]
  elif how == 'flipped':
    content[len(content) // 2] ^= 1
  largest.write_bytes(content)


@pytest.mark.parametrize('how', ['truncated', 'flipped'])
def test_damaged_checkpoint_falls_back(one_device, how, tmp_path, capfd):
  shutil.copytree(one_device, tmp_path / 'run')
  damage(tmp_path / 'run' / 'checkpoints' / '6', how)
  run(tiny(), tmp_path / 'run', jax.devices()[:1])
  first = capfd.readouterr().err.splitlines()[0]
  assert first.startswith('warning: ') and 'checkpoints/6 is damaged' in first
  assert losses(tmp_path / 'run') == losses(one_device)


def test_other_architecture_is_refused(one_device):
  with pytest.raises(ConfigError, match=r'another model: .*\(.*\) here'):
    run(tiny(**{'model.d_model': 32}), one_device, jax.devices()[:1])
  with pytest.raises(ConfigError, match='absent'):
    run(tiny(**{'model.pattern': 'gla'}), one_device, jax.devices()[:1])


def test_other_data_is_refused(one_device):
  with pytest.raises(ConfigError, match='batch_size=16 but .* began with 8'):
    run(tiny(batch_size=16), one_device)


def test_divergence_stops_with_what_is_needed(tmp_path):
  config = tiny(**{'optimizer.learning_rate': 1e38, 'optimizer.clip_norm': 0})
  with pytest.raises(
    NonFiniteError, match=r'step \d: loss=.*crc32 [0-9a-f]{8}'
  ):
    run(config, tmp_path, jax.devices()[:1])


@pytest.mark.in_turn
def test_divergence_can_be_skipped(tmp_path):
  config = tiny(
    **{
      'optimizer.learning_rate': 1e38,
      'optimizer.clip_norm': 0,
      'skip_nonfinite': 100,
    }
  )
  run(config, tmp_path, jax.devices()[:1])
  values = parameters(tmp_path)
  assert all(np.isfinite(value).all() for value in values)


@pytest.mark.in_turn
def test_profile(tmp_path):
  run(tiny(profile_steps='2:3'), tmp_path, jax.devices()[:1])
  assert list((tmp_path / 'profile').rglob('*.pb'))


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'mesh': 'tensor=3'}, 'uses 6 devices but there are 8'),
    ({'mesh': 'tenser=2'}, "did you mean 'tensor'"),
    ({'mesh': 'tensor=8,data=1'}, 'tensor=8 does not divide the heads'),
    ({'batch_size': 12}, '12 rows, which data x fsdp = 8 devices do not'),
    ({'model.vocab_size': 100}, 'below the 256 tokens'),
    ({'profile_steps': '5'}, "must be 'first:last'"),
    ({'model.ffn': 'gul'}, "did you mean 'glu'"),
    ({'model.remat': 'dot'}, "did you mean 'dots'"),
  ],
  ids=str,
)
def test_mistakes_are_one_line(changes, message, tmp_path):
  with pytest.raises(ConfigError, match=message) as error:
    run(tiny(**changes), tmp_path)
  assert '\n' not in str(error.value)


def test_parse_mesh():
  assert sharding.mesh_sizes('', 8) == dict(data=8, fsdp=1, tensor=1)
  assert sharding.mesh_sizes('tensor=4', 8) == dict(data=2, fsdp=1, tensor=4)
  assert parse_steps('10:15') == (10, 15)


def test_saved_config_relaunches(one_device):
  saved = config_files.load(str(one_device / 'config.json'))
  assert json.dumps(saved) == json.dumps(
    config_files.load(str(one_device / 'config.json'))
  )
  config = configs.resolve(saved)
  assert config.data == tiny().data and check(config).config == config


@pytest.mark.in_turn
def test_each_source_of_a_mixture_is_validated(tmp_path):
  """And the whole is the mean over all of their tokens."""
  for name, text in ('a', 'ab'), ('b', 'xyz'):
    lines = [json.dumps({'text': text * (9 + i)}) for i in range(60)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  mixture = {
    name: {'path': str(tmp_path / f'{name}.jsonl'), 'weight': weight}
    for name, weight in (('a', 0.7), ('b', 0.3))
  }
  changes = {
    'data': {'name': 'text', 'seq_len': 16, 'mixture': mixture},
    'model.vocab_size': 256,
    'eval_batches': 0,
  }
  config = configs.resolve(configs.override(TINY, changes))
  final = run(config, tmp_path / 'run', jax.devices()[:1])
  dataset = data.load(config.data, batch_size=config.batch_size)
  weights = {
    name: sum((batch['segment_ids'][:, 1:] > 0).sum() for batch in part)
    for name, part in dataset.valid_parts.items()
  }
  mean = sum(final[f'{n}/loss'] * w for n, w in weights.items())
  np.testing.assert_allclose(
    final['loss'], mean / sum(weights.values()), rtol=1e-5
  )
  assert final['a/loss'] != final['b/loss']
