"""What holds for every dataset: shapes, seeds, processes, checkpoints."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import write_tokens

CONFIGS = {
  'concat': DataConfig(seq_len=64),
  'segments': DataConfig(seq_len=64, packing='segments'),
  'mask': DataConfig(seq_len=64, corruption='mask'),
  'spans': DataConfig(
    seq_len=64, corruption='spans', path='{}/documents.jsonl'
  ),
  'jsonl': DataConfig(seq_len=64, path='{}/documents.jsonl'),
  'labelled': DataConfig(
    seq_len=64, label_key='label', path='{}/documents.jsonl'
  ),
  'pixels': DataConfig(name='pixels'),
  'mixture': DataConfig(
    seq_len=64,
    mixture={
      'a': {'path': '{}/documents.jsonl', 'weight': 0.7},
      'b': {'path': '{}/others.jsonl', 'weight': 0.3},
    },
  ),
  'cache': DataConfig(seq_len=64, path='{}/documents.tokens'),
  'digits': DataConfig(name='digits', augment=True),
  'stored_task': DataConfig(name='image_sequence'),
  'drawn_task': DataConfig(name='byte_classification'),
}


@pytest.fixture(params=CONFIGS)
def config(request, tmp_path):
  return _written(CONFIGS[request.param], tmp_path)


def _written(config, folder):
  rng = np.random.default_rng(0)
  lines = [
    json.dumps({'text': 'é' * int(n) + str(i), 'label': i % 3})
    for i, n in enumerate(rng.integers(0, 200, 100))
  ]
  (folder / 'documents.jsonl').write_text('\n'.join(lines) + '\n')
  (folder / 'others.jsonl').write_text('\n'.join(lines[::-1]) + '\n')
  if config.path.endswith('.tokens'):
    text = DataConfig(path=f'{folder}/documents.jsonl')
    write_tokens.write(text, f'{folder}/documents.tokens', shard_bytes=999)
  mixture = {
    name: source | {'path': source['path'].format(folder)}
    for name, source in config.mixture.items()
  }
  path = config.path.format(folder)
  return dataclasses.replace(config, path=path, mixture=mixture)


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _assert_equal(ours, theirs):
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _differ(ours, theirs):
  (key,) = {'tokens', 'inputs', 'image'} & ours[0].keys()
  return any(
    (a[key] != b[key]).any() for a, b in zip(ours, theirs, strict=True)
  )


def test_shapes_and_dtypes():
  (batch,) = _take(data.load(CONFIGS['concat'], batch_size=4).train, 1)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    k: ((4, 65), np.int32) for k in ('tokens', 'segment_ids', 'positions')
  }
  (batch,) = _take(data.load(CONFIGS['digits'], batch_size=4).train, 1)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    'image': ((4, 8, 8, 1), np.float32),
    'label': ((4,), np.int32),
    'weight': ((4,), np.float32),
  }


def test_seed_decides_the_order(config):
  def batches(seed):
    return _take(data.load(config, batch_size=4, seed=seed).train, 5)

  _assert_equal(batches(1), batches(1))
  assert _differ(batches(1), batches(2))


@pytest.mark.parametrize('step', [0, 1, 4, 30])
def test_state_survives_json(config, step):
  batches = iter(data.load(config, batch_size=4, seed=1).train)
  _take(batches, step)
  state = json.loads(json.dumps(batches.get_state()))
  expected = _take(batches, 4)
  fresh = iter(data.load(config, batch_size=4, seed=1).train)
  _take(fresh, 3)
  fresh.set_state(state)
  _assert_equal(_take(fresh, 4), expected)


def test_orbax_saves_the_iterator(config, tmp_path):
  batches = iter(data.load(config, batch_size=4).train)
  _take(batches, 3)
  state = {'w': jnp.arange(4.0)}
  with ocp.training.Checkpointer(tmp_path / 'run') as checkpointer:
    checkpointer.save_checkpointables(3, dict(state=state, dataset=batches))
  expected = _take(batches, 2)
  fresh = iter(data.load(config, batch_size=4).train)
  with ocp.training.Checkpointer(tmp_path / 'run') as checkpointer:
    checkpointer.load_checkpointables(3, dict(state=state, dataset=fresh))
  _assert_equal(_take(fresh, 2), expected)


@pytest.mark.parametrize('split', ['train', 'valid'])
def test_processes_share_every_batch(config, split):
  def batches(index, count):
    loaded = data.load(
      config, batch_size=4, process_index=index, process_count=count
    )
    return _take(getattr(loaded, split), 8)

  first, second = batches(0, 2), batches(1, 2)
  both = jax.tree.map(lambda *rows: np.concatenate(rows), first, second)
  _assert_equal(both, batches(0, 1))
  assert _differ(first, second)


def test_a_batch_may_be_one_example():
  one, four = (
    data.load(DataConfig(name='digits'), batch_size=size).train
    for size in (1, 4)
  )
  (whole,) = _take(four, 1)
  rows = [batch['label'][0] for batch in _take(one, 4)]
  np.testing.assert_array_equal(rows, whole['label'])


def test_epochs_are_shuffled_anew():
  loaded = data.load(DataConfig(name='digits'), batch_size=1500)
  first, second = _take(loaded.train, 2)
  assert sorted(first['label']) != list(first['label'])
  assert (first['label'] != second['label']).any()


@pytest.mark.in_turn
@pytest.mark.parametrize('name', ['jsonl', 'mixture', 'cache'])
def test_workers_prepare_batches(tmp_path, name):
  config = _written(CONFIGS[name], tmp_path)
  here = data.load(config, batch_size=4)
  there = data.load(DataConfig(**vars(config) | {'workers': 1}), batch_size=4)
  batches = iter(there.train)
  try:
    _assert_equal(_take(batches, 3), _take(here.train, 3))
    state = json.loads(json.dumps(batches.get_state()))
    expected = _take(batches, 2)
    batches.set_state(state)
    _assert_equal(_take(batches, 2), expected)
  finally:
    batches.close()


def test_mistakes_name_the_key():
  with pytest.raises(ConfigError, match="data.name='txt'.*'text'"):
    data.load(DataConfig(name='txt'), batch_size=4)
  with pytest.raises(ConfigError, match='batch_size=4 .* 3 processes'):
    data.load(DataConfig(), batch_size=4, process_count=3)


def test_example_is_a_row_of_every_batch(config):
  found = data.load(config, batch_size=2)
  for batches, row in (
    (found.train, found.example),
    (found.valid, found.valid_example),
  ):
    batch = next(iter(batches))
    shapes = {k: (x.shape[1:], x.dtype) for k, x in batch.items()}
    assert shapes == {k: (x.shape, x.dtype) for k, x in row.items()}
