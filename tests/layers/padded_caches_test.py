"""Prompts of unequal length in one batch, and caches on a mesh."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import new_cursor, positions_of
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import MIXERS, build_mixer, mixer_options
from efficient_attn.layers.recurrence import Recurrent
from tests.layers.built import filled
from tests.layers.mixers_test import SMALL

# The recurrences are tested by `left_padding_test`.
ROWS = [
  name
  for name, spec in MIXERS.items()
  if spec.causal
  and not (isinstance(spec.build, type) and issubclass(spec.build, Recurrent))
]
# Blocks of these are counted from the start of a row.
ALONE = (
  'compressive',
  'synthesizer',
  'reformer',
  'moba',
  'nsa',
  'routing',
  'seer',
  'sinkhorn',
)
PADDED = [name for name in ROWS if name not in ALONE]
LENGTHS, STEPS, D = (3, 7, 5), 4, 16
T = max(LENGTHS)


def make(name):
  options = {k: v for k, v in SMALL.items() if k in mixer_options(name)}
  return filled(
    lambda: build_mixer(
      name, d_model=D, num_heads=2, rngs=nnx.Rngs(0), **options
    )
  )


def rows(length, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((len(LENGTHS), length, D)).astype(np.float32)


@functools.partial(jax.jit, static_argnames='cuts')
def decode(mixer, x, ids, cuts):
  """Reads the prompts in pieces that end at `cuts`, and the rest by token."""
  cache, parts = mixer.init_cache(len(x), x.shape[1], x.dtype), []
  for a, b in itertools.pairwise((0, *cuts)):
    y, cache = mixer(x[:, a:b], Context(segment_ids=ids[:, a:b]), cache)
    parts.append(y)

  def step(cache, token):
    y, cache = mixer(token[:, None], Context(), cache)
    return cache, y[:, 0]

  _, rest = jax.lax.scan(step, cache, x[:, cuts[-1] :].swapaxes(0, 1))
  return jnp.concatenate([*parts, rest.swapaxes(0, 1)], 1)


@pytest.mark.parametrize('name', PADDED)
def test_rows_of_unequal_length_decode_as_each_alone(name):
  mixer, x = make(name), rows(T + STEPS)
  expected = jax.jit(lambda mixer, x: mixer(x)[0])(mixer, x)
  starts = [T - length for length in LENGTHS]
  front = np.arange(T) < np.array(starts)[:, None]
  joined = rows(T + STEPS, seed=1)  # what stands in front must not matter
  for row, start in enumerate(starts):
    joined[row, start:] = x[row, : T + STEPS - start]
  nothing = np.where(np.pad(front, ((0, 0), (0, STEPS)))[..., None], np.nan, 0)
  padding = np.where(front, 0, 1)
  # The first row begins with a call.
  cases = [
    ('padding', joined + nothing, padding, (T,)),
    ('padding in two calls', joined, padding, (starts[0], T)),
    ('another segment', joined, np.where(front, 2, 1), (T,)),
  ]
  for case, inputs, ids, cuts in cases:
    found = decode(mixer, inputs, ids.astype(np.int32), cuts)
    for row, start in enumerate(starts):
      np.testing.assert_allclose(
        found[row, start:],
        expected[row, : T + STEPS - start],
        rtol=2e-6,
        atol=2e-5,
        err_msg=f'{case}, row {row}',
      )
    assert np.isfinite(found).all(), case


def test_positions_count_from_the_first_token_of_a_segment():
  ids = jnp.array([[0, 0, 1, 1], [0, 0, 0, 0], [4, 4, 4, 7]])
  first = Context(segment_ids=ids)
  cursor = new_cursor()
  np.testing.assert_array_equal(
    positions_of(first, cursor, 4), [[0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 0]]
  )
  cursor = cursor.advance(4, first)
  np.testing.assert_array_equal(cursor.start, [2, 4, 3])
  more = Context(segment_ids=jnp.array([[1, 1], [0, 5], [7, 7]]))
  np.testing.assert_array_equal(
    positions_of(more, cursor, 2), [[2, 3], [0, 0], [1, 2]]
  )
  cursor = cursor.advance(2, more)
  np.testing.assert_array_equal(
    positions_of(Context(), cursor, 1), [[4], [1], [3]]
  )


@pytest.mark.parametrize('name', ALONE)
def test_others_refuse_them_by_name(name):
  mixer = nnx.eval_shape(lambda: make(name))
  context = Context(segment_ids=jnp.ones((1, 2), jnp.int32))

  def run(mixer):
    cache = mixer.init_cache(1, 2, jnp.float32)
    return mixer(jnp.zeros((1, 2, D)), context, cache)

  with pytest.raises(NotImplementedError, match=type(mixer).__name__):
    jax.eval_shape(run, mixer)


def test_an_op_on_a_mesh_keeps_a_number():
  """An offset that is an int is static, one of a cache is an array."""

  def op(x, *, offset, starts=None):
    static = isinstance(offset, int)
    return x + offset + (10 if static else 20) + (0 if starts is None else 1)

  mesh = sharding.make_mesh('data=2', jax.devices()[:2])
  with jax.set_mesh(mesh):
    run = sharding.local_op(op, ('BT',), 'BT', offset='', starts='B')
    x = jnp.zeros((2, 1))
    assert jax.jit(lambda: run(x, offset=3).sum())() == 2 * 13
    traced = jax.jit(lambda n: run(x, offset=n, starts=jnp.zeros(2)).sum())
    assert traced(jnp.int32(3)) == 2 * 24


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=pytest.mark.exhaustive if i % 4 else ())
    for i, name in enumerate(ROWS)
  ],
)
def test_a_cache_continues_on_a_mesh(name):
  mixer, x = make(name), rows(T)[:2]

  def run(mixer, x):
    cache = mixer.init_cache(len(x), T, x.dtype)
    y, cache = mixer(x[:, :-1], cache=cache)
    return jnp.concatenate([y, mixer(x[:, -1:], cache=cache)[0]], 1)

  mesh = sharding.make_mesh('fsdp=2,tensor=2', jax.devices()[:4])
  placed = jax.tree.map(
    lambda p: p.replace(
      jax.device_put(
        p[...], jax.NamedSharding(mesh, sharding.param_spec(p.axes))
      )
    ),
    nnx.state(mixer),
    is_leaf=lambda p: isinstance(p, nnx.Variable),
  )
  with jax.set_mesh(mesh):
    batch = sharding.activation_spec(('batch', None, None))
    found = jax.jit(run)(
      nnx.merge(nnx.graphdef(mixer), placed),
      jax.device_put(x, jax.NamedSharding(mesh, batch)),
    )
  np.testing.assert_allclose(found, jax.jit(run)(mixer, x), atol=2e-5)
