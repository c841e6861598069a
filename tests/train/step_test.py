"""An accumulated step is the plain step, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_train_step, micro_batches
from efficient_attn.train.trainer import batch_putter

ROWS = 48  # of a batch: 1, 2 or 3 a shard on each mesh below
MESHES = {
  'data=1': 1,
  'tensor=2': 2,
  'data=2': 2,
  'data=8': 8,
  'fsdp=8': 8,
  'data=4,tensor=2': 8,
  'data=2,fsdp=2,tensor=2': 8,
  'fsdp=2,tensor=4': 8,
}


def make_mesh(text):
  return sharding.make_mesh(text, jax.devices()[: MESHES[text]])


def parts_of(mesh, rows):
  """Returns the `accumulate` that leaves `rows` rows a shard."""
  return ROWS // (rows * mesh.shape['data'] * mesh.shape['fsdp'])


@functools.cache
def make_step(accumulate, dropout=0.0):
  """Returns a config, its architecture, its optimizer and its step."""
  config = configs.resolve(
    dict(
      batch_size=ROWS,
      accumulate=accumulate,
      ema=0.5,
      model=dict(
        name='lm',
        d_model=16,
        num_layers=1,
        num_heads=4,
        vocab_size=16,
        ffn='none',
        dropout=dropout,
        dtype='float32',
      ),
      optimizer=dict(name='sgd', learning_rate=0.3, schedule='constant'),
    )
  )
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )
  return config, architecture, optimizer, jax.jit(step)


def batch():
  """Documents of unequal length, so that the parts weigh differently."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 16, (ROWS, 9)).astype(np.int32)
  lengths = rng.integers(2, 10, (ROWS, 1))
  segment_ids = (np.arange(9) < lengths).astype(np.int32)
  return dict(tokens=tokens, segment_ids=segment_ids)


def take(text, accumulate):
  """Takes a step on a mesh; returns parameters, averages and metrics."""
  config, architecture, optimizer, step = make_step(accumulate)
  mesh = make_mesh(text)
  with jax.set_mesh(mesh):
    state = architecture.init(config, optimizer, mesh)
    state, metrics = step(state, batch_putter(mesh)(batch()))
  return jax.device_get((state.params, state.ema, metrics))


@pytest.fixture(scope='module')
def plain():
  return take('data=1', 1)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'text,rows',
  [
    ('data=1', 1),
    ('data=8', 1),
    ('data=4,tensor=2', 2),
    ('data=2,fsdp=2,tensor=2', 3),
  ],
)
def test_accumulated_equals_plain(text, rows, plain):
  found = take(text, parts_of(make_mesh(text), rows))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    found,
    plain,
  )


@pytest.mark.parametrize('text', MESHES)
@pytest.mark.parametrize('rows', [1, 2, 3])
def test_parts_stay_on_their_devices(text, rows):
  mesh = make_mesh(text)
  parts = parts_of(mesh, rows)
  host = np.arange(ROWS * 2).reshape(ROWS, 2)
  with jax.set_mesh(mesh):
    put = batch_putter(mesh)
    for x in (host, host[:, 0]):
      found = jax.typeof(micro_batches(put(x), parts))
      wanted = (None, ('data', 'fsdp'), None)[: found.ndim]
      assert found.shape == (parts, ROWS // parts, 2)[: found.ndim]
      assert found.sharding.spec == jax.sharding.PartitionSpec(*wanted)
    found = micro_batches(put(host), parts)
    for i in range(parts):
      np.testing.assert_array_equal(found[i], host[i::parts])


@pytest.mark.parametrize('text', MESHES)
@pytest.mark.parametrize('rows,dropout', [(1, 0.5), (3, 0.0)])
def test_steps_are_traced_on_every_mesh(text, rows, dropout):
  mesh = make_mesh(text)
  config, architecture, optimizer, step = make_step(
    parts_of(mesh, rows), dropout
  )
  with jax.set_mesh(mesh):
    state = architecture.abstract_state(config, optimizer, mesh)
    new, metrics = jax.eval_shape(step, state, batch_putter(mesh)(batch()))
  specs = [
    [x.sharding.spec for x in jax.tree.leaves(tree)] for tree in (new, state)
  ]
  assert specs[0] == specs[1] and metrics['loss'].sharding.is_fully_replicated


def test_parts_drop_with_keys_of_their_own():
  config, architecture, optimizer, _ = make_step(2, dropout=0.5)
  keys = []

  def loss(model, batch, key, teacher):
    jax.debug.callback(lambda k: keys.append(k), jax.random.key_data(key))
    total = jnp.sum(model.embed.table[...]) * jnp.sum(batch['tokens'])
    one = jnp.float32(1)
    return dict(
      objective=total, loss=total, correct=one, weight=one, tokens_read=one
    )

  mesh = make_mesh('data=1')
  with jax.set_mesh(mesh):
    state = architecture.init(config, optimizer, mesh)
    step = make_train_step(config, architecture, optimizer, loss)
    jax.block_until_ready(jax.jit(step)(state, batch_putter(mesh)(batch())))
    jax.effects_barrier()
  assert len({tuple(np.ravel(key)) for key in keys}) == len(keys) == 2
