"""Runs that train parts of a model, begin with another run, or have a teacher.

Each ends bitwise the same when it was stopped and continued.
"""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_attn import config as configs
from efficient_attn import config_files, sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.adapter import is_adapter, merge_adapters
from efficient_attn.train import trainer, watch
from efficient_attn.train.check import check
from efficient_attn.train.groups import flat
from efficient_attn.train.load import load_model, open_run
from efficient_attn.train.metrics import read_metrics
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture, first_state, nested
from efficient_attn.train.step import make_train_step
from tests.train.tiny_runs import (
  assert_same_parameters,
  contents,
  rows,
  run,
  tiny,
)

ONE = sharding.make_mesh('data=1', jax.devices()[:1])
LORA = {'lora.rank': 2, 'optimizer.groups.norms.match': '*norm.scale'}
FROZEN = {
  'optimizer.groups.old.match': 'embed.*',
  'optimizer.groups.old.frozen': True,
  'optimizer.groups.slow.match': '*.ffn.*',
  'optimizer.groups.slow.learning_rate': 1e-4,
  'optimizer.groups.slow.weight_decay': 0,
}
AVERAGE = {'teacher.momentum': 0.9}


def first(config, **options):
  """Returns an architecture and a state before step 1."""
  architecture = Architecture(config.model, config.lora, config.optimizer)
  optimizer = architecture.optimizer(config)
  params = architecture.initial_params(jax.random.key(0))
  params, frozen = architecture.split(params)
  state = first_state(
    config, optimizer, params, jax.random.key(0), frozen, **options
  )
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )
  return architecture, state, jax.jit(step)


def batch():
  rng = np.random.default_rng(0)
  tokens, labels = rng.integers(32, size=(2, 2, 16))
  weights = np.zeros((2, 16), np.float32)
  weights[0, [2, 7, 11]] = weights[1, 5] = 1
  return dict(tokens=tokens, labels=labels, weights=weights)


@pytest.mark.parametrize('name', ['adamw', 'muon', 'sophia', 'adafactor'])
def test_a_group_trains_as_a_run_with_its_options(name):
  """Without clipping, parameters of a group move as in a run of its config."""
  plain = {'optimizer.name': name, 'optimizer.clip_norm': 0}
  slow = {'optimizer.learning_rate': 1e-4, 'optimizer.weight_decay': 0}
  after = []
  for changes in (FROZEN, {}, slow):
    _, state, step = first(tiny(**plain | changes))
    new, _ = step(state, batch())
    before = flat(state.params)
    moved = {n: np.subtract(x, before[n]) for n, x in flat(new.params).items()}
    after.append(moved)
    if changes is FROZEN:
      assert set(flat(new.frozen)) == {'embed.table'}
      assert set(moved) == set(before)
  grouped, usual, slowly = after
  if name == 'sophia':  # its curvature is of the parameters that move alone
    usual = slowly = None
  for parameter, found in grouped.items():
    assert np.abs(found).max() > 0, parameter
    wanted = slowly if '.ffn.' in parameter else usual
    if wanted is not None:
      np.testing.assert_allclose(found, wanted[parameter], atol=1e-8)


def test_clipping_is_over_all_groups():
  gradient = []
  for changes in ({}, {'optimizer.groups.slow.match': '*.ffn.*'}):
    changes = changes | {
      'optimizer.name': 'sgd',
      'optimizer.clip_norm': 1e-3,
      'optimizer.weight_decay': 0,
    }
    _, state, step = first(tiny(**changes))
    new, _ = step(state, batch())
    moved = jax.tree.map(jnp.subtract, new.params, state.params)
    gradient.append(optax.tree.norm(moved))
  np.testing.assert_allclose(*gradient, rtol=1e-4)


def test_frozen_parts_cost_no_state_and_no_gradient():
  config = tiny(**LORA)
  _, state, _ = first(config)
  trained = {name for name in flat(state.params)}
  assert all(is_adapter(name) or 'norm' in name for name in trained)
  size = sum(x.size for x in jax.tree.leaves(state.params))
  assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 2 * size + 9
  # Its gradient would be an array of its shape that the program computes.
  for what, changes in ('all', {}), ('adapters', LORA):
    _, state, step = first(tiny(**changes | {'model.vocab_size': 48}))
    text = step.lower(state, batch()).compile().as_text()
    computed = [line for line in text.splitlines() if ' = f32[48,8]' in line]
    computed = [
      x for x in computed if not re.search('parameter|get-tuple|copy', x)
    ]
    assert bool(computed) == (what == 'all'), computed


def test_adapters_merge_exactly():
  config = tiny(**LORA)
  architecture, state, step = first(config)
  for _ in range(3):
    state, _ = step(state, batch())
  everything = flat(state.params) | flat(state.frozen)
  adapted = architecture.merge(state.params, state.frozen)
  plain = Architecture(config.model).merge(
    nested(merge_adapters(everything, config.lora))
  )
  tokens = batch()['tokens']
  found, wanted = (jax.jit(lambda m: m(tokens)[0])(m) for m in (plain, adapted))
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  untouched = Architecture(config.model).merge(
    nested({n: x for n, x in everything.items() if not is_adapter(n)})
  )
  assert np.abs(found - untouched(tokens)[0]).max() > 1e-3


def stop_after(monkeypatch, step):
  def requested(self, now):
    self.name = 'SIGTERM'
    return now == step

  monkeypatch.setattr(watch.StopSignal, 'requested', requested)


@pytest.mark.in_turn
@pytest.mark.parametrize('changes', [LORA, FROZEN, AVERAGE], ids=str)
def test_a_stopped_run_goes_on_as_it_was(changes, tmp_path, monkeypatch):
  run(tmp_path / 'whole', **changes)
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    assert run(tmp_path / 'parts', **changes) == {}
  run(tmp_path / 'parts', **changes)
  assert rows(tmp_path / 'parts') == rows(tmp_path / 'whole')
  assert_same_parameters(tmp_path / 'parts', tmp_path / 'whole')


def test_checkpoints_hold_what_is_trained(tmp_path):
  run(tmp_path, **LORA)
  saved = (tmp_path / 'checkpoints' / '6' / 'state' / '_METADATA').read_text()
  assert 'lora_a' in saved and 'embed' not in saved
  assert 'embed' in (tmp_path / 'frozen' / 'state' / '_METADATA').read_text()
  before = contents(tmp_path)
  _, model = load_model(tmp_path)
  assert contents(tmp_path) == before and not hasattr(
    next(model.stack.blocks()).mixer.out, 'lora_a'
  )
  file = next((tmp_path / 'frozen').rglob('d/*'))
  file.write_bytes(file.read_bytes()[:-1] + b'x')
  with pytest.raises(ConfigError, match='frozen parameters .* has changed'):
    load_model(tmp_path)


# Beginning with another run.


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """A run of two layers, unrolled."""
  workdir = tmp_path_factory.mktemp('other')
  run(workdir, **OTHER)
  return workdir


OTHER = {
  'model.num_layers': 4,
  'model.scan_layers': False,
  'model.position': 'learned',
  'model.max_len': 16,
}
HYBRID = {
  'model.num_layers': 4,
  'model.pattern': ('gla', 'attention'),
  'model.position': 'learned',
  'model.max_len': 24,
  'init_from.new': '*.mixer.*',
  'init_from.unused': '*.mixer.*',
  'init_from.resized': ('position.table', '*.mixer.*'),
}


def test_a_run_begins_with_another(other, tmp_path):
  """Of another pattern, scanned, and of longer sequences."""
  changes = HYBRID | {'init_from.run': str(other)}
  state = begun(tiny(**changes), tmp_path)
  params = open_run(other).params(ONE)
  theirs, ours = flat(params), flat(state.params)
  for name in ('embed.table', 'norm.scale'):
    np.testing.assert_array_equal(ours[name], theirs[name])
  np.testing.assert_array_equal(
    ours['position.table'][:16], theirs['position.table']
  )
  assert np.abs(ours['position.table'][16:]).max() > 0
  for layer in range(4):
    for part in ('ffn.up.weight', 'mixer.out.weight'):
      if part.startswith('mixer') and not layer % 2:
        continue
      np.testing.assert_array_equal(
        ours[f'stack.periods.blocks.{layer % 2}.{part}'][layer // 2],
        theirs[f'stack.periods.{layer}.blocks.0.{part}'],
      )


def begun(config, workdir):
  """Returns the state that a run starts with."""

  class Started(Exception):
    """Ends it there."""

  real = Architecture.init

  def init(*args):
    raise Started(real(*args))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Architecture, 'init', init)
    with pytest.raises(Started) as started:
      trainer.run(config, workdir, jax.devices()[:1])
  return started.value.args[0]


@pytest.mark.parametrize('key', ['new', 'unused', 'resized'])
def test_differences_have_to_be_named(key, other):
  changes = HYBRID | {'init_from.run': str(other), f'init_from.{key}': ()}
  name = 'position.table' if key == 'resized' else 'stack.layers.0.mixer'
  with pytest.raises(ConfigError, match=f'init_from.{key} does not .*{name}'):
    check(tiny(**changes))


@pytest.mark.in_turn
def test_a_run_with_adapters_is_begun_from(tmp_path):
  """Its adapters are merged; the new run may have others."""
  run(tmp_path / 'a', **LORA)
  changes = {'init_from.run': str(tmp_path / 'a')}
  state = begun(tiny(**changes), tmp_path / 'b')
  _, model = load_model(tmp_path / 'a')
  table = next(model.stack.blocks()).mixer.out.weight[...]
  found = state.params['stack']['periods'][0]['blocks'][0]['mixer']['out']
  np.testing.assert_array_equal(found['weight'], table)
  state = begun(tiny(**changes | LORA), tmp_path / 'c')
  assert not np.any(flat(state.params)[ADAPTER])


ADAPTER = 'stack.periods.0.blocks.0.mixer.out.lora_b.weight'


# Teachers.


@pytest.mark.in_turn
def test_a_student_nears_its_teacher(other, tmp_path):
  changes = OTHER | {
    'model.num_layers': 1,
    'teacher.run': str(other),
    'teacher.weight': 1.0,
    'steps': 30,
    'eval_every': 0,
    'checkpoint_every': 0,
  }
  run(tmp_path, **changes)
  found = [r['train/kl'] for r in read_metrics(tmp_path) if 'train/kl' in r]
  assert np.mean(found[-5:]) < 0.7 * np.mean(found[:5])
  assert 'valid/kl' not in read_metrics(tmp_path)[-1]


def test_the_objective_is_that_of_hinton():
  """(1 - w) nll + w T^2 KL, by numpy, mean over the answers."""
  changes = {'teacher.weight': 0.25, 'teacher.temperature': 3.0}
  config = tiny(**changes)
  architecture = Architecture(config.model)
  student, guide = (
    architecture.merge(architecture.initial_params(jax.random.key(i)))
    for i in range(2)
  )
  read = batch()
  sums = make_objective(config)(student, read, None, guide)

  def log_probabilities(model, temperature):
    logits = np.float64(model(read['tokens'])[0]) / temperature
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

  nll = -np.take_along_axis(
    log_probabilities(student, 1), read['labels'][..., None], -1
  )[..., 0]
  p, q = (log_probabilities(model, 3) for model in (guide, student))
  kl = 9 * (np.exp(p) * (p - q)).sum(-1)
  weights = read['weights']
  np.testing.assert_allclose(sums['kl'], (kl * weights).sum(), rtol=1e-4)
  np.testing.assert_allclose(
    sums['objective'], ((0.75 * nll + 0.25 * kl) * weights).sum(), rtol=1e-5
  )


def test_the_average_rises_as_its_schedule():
  config = tiny(**AVERAGE)
  _, state, step = first(config)
  average = flat(state.teacher)
  for i in range(3):
    new, _ = step(state, batch())
    decay = 1 - 0.1 * (np.cos(np.pi * i / config.steps) + 1) / 2
    average = {
      name: decay * x + (1 - decay) * flat(new.params)[name]
      for name, x in average.items()
    }
    state = new
  for name, x in flat(state.teacher).items():
    np.testing.assert_allclose(x, average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.in_turn
def test_a_changed_teacher_is_noticed(other, tmp_path, monkeypatch):
  shutil.copytree(other, tmp_path / 'teacher')
  changes = OTHER | {'teacher.run': str(tmp_path / 'teacher')}
  with monkeypatch.context() as patch:
    stop_after(patch, 3)
    run(tmp_path / 'a', **changes)
  run(tmp_path / 'teacher', **OTHER | {'steps': 8})
  with pytest.raises(ConfigError, match='the teacher has changed since'):
    run(tmp_path / 'a', **changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'teacher.run': 'nowhere'}, "teacher.run='nowhere': no run there"),
    ({'init_from.run': 'nowhere'}, "init_from.run='nowhere': no run there"),
    ({'teacher.run': 'a', 'teacher.momentum': 0.9}, 'two teachers'),
    ({'lora.rank': 2, 'lora.match': '*.atention.*'}, 'matches no projection'),
    (
      {'optimizer.groups.a.match': '*.atention.*'},
      "optimizer.groups.a.match='\\*.atention.\\*' matches no parameter",
    ),
    ({'optimizer.groups.a.frozen': True}, 'optimizer.groups.a.match is empty'),
    (
      {'optimizer.groups.a.match': '*', 'optimizer.groups.a.frozen': True},
      'freezes every parameter',
    ),
    (
      {'optimizer.groups.a.match': '*', 'optimizer.groups.b.match': 'embed.*'},
      'both match embed.table',
    ),
    (
      {'optimizer.groups.a.match': '*.ffn.*', 'optimizer.groups.a.rate': 1},
      'optimizer.groups.a.rate=1 is not a known key',
    ),
    (
      {
        'optimizer.groups.a.match': '*.ffn.*',
        'optimizer.name': 'schedule_free',
      },
      'use another optimizer',
    ),
  ],
  ids=str,
)
def test_mistakes_are_one_line(changes, message):
  with pytest.raises(ConfigError, match=message):
    check(tiny(**changes))


def test_the_config_of_a_run_names_its_groups(tmp_path):
  config = check(tiny(**FROZEN | LORA)).config
  config_files.save(config, tmp_path / 'config.json')
  saved = configs.resolve(config_files.load(str(tmp_path / 'config.json')))
  for key in ('optimizer', 'lora'):
    assert getattr(saved, key) == getattr(config, key)


@pytest.mark.in_turn
@pytest.mark.parametrize('changes', [LORA, AVERAGE, FROZEN], ids=str)
def test_a_mesh_changes_nothing(changes):
  """Frozen parts, adapters and averages are laid out as parameters are."""
  changes = changes | {'batch_size': 8, 'optimizer.clip_norm': 0}
  changes |= {'model.num_layers': 2, 'optimizer.name': 'sgd'}
  config = tiny(**changes)
  architecture = Architecture(config.model, config.lora, config.optimizer)
  optimizer = architecture.optimizer(config)
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )
  tokens = np.tile(batch()['tokens'], (4, 1))
  weights = np.tile(batch()['weights'], (4, 1))
  rows = dict(tokens=tokens, labels=tokens, weights=weights)
  found = []
  for mesh in ('data=1', 'data=2,fsdp=2,tensor=2'):
    mesh = sharding.make_mesh(mesh, jax.devices()[: 8 if '2' in mesh else 1])
    state = architecture.init(config, optimizer, mesh)
    with jax.set_mesh(mesh):
      new, _ = jax.jit(step)(state, trainer.batch_putter(mesh)(rows))
    places = [jax.tree.map(lambda x: x.sharding.spec, s) for s in (state, new)]
    assert places[0] == places[1]
    found.append(jax.device_get((new.params, new.frozen, new.teacher)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found
  )
