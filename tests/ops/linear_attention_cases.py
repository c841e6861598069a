"""Calls of linear_attention and what they should give, for its tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.recurrent.linear_attention import linear_attention
from tests.oracles import linear_attention as oracle

CHUNK = 4
LENGTH = 3 * CHUNK + 5
GATES = ('none', 'constant', 'scalar', 'channel')
BATCH, HEADS, CHANNELS, VALUES = 2, 4, 3, 5

# name: (kv heads, with a state, with segments, options)
FEATURES = {
  'plain': (4, False, False, {}),
  'grouped': (2, False, False, {'scale': 0.3}),
  'state_segments': (2, True, True, {}),
  'exclusive_bonus': (2, True, True, {'read': 'exclusive'}),
  'normalize': (2, True, True, {'normalize': True}),
  'bidirectional': (2, False, True, {'bidirectional': True}),
  'bidirectional_all': (
    2,
    False,
    True,
    {'bidirectional': True, 'normalize': True, 'read': 'exclusive'},
  ),
}


def make(
  gate,
  length,
  *,
  kv_heads=2,
  state=False,
  segments=False,
  options=(),
  seed=0,
  batch=BATCH,
  heads=HEADS,
  channels=CHANNELS,
  values=VALUES,
  dtype=np.float64,
):
  """Arrays (a dict) and options (a dict) of one call."""
  options = dict(options)
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
  normalize = options.get('normalize', False)
  shape = (batch, length, kv_heads, channels)
  arrays = {'q': normal(*shape), 'k': normal(*shape)}
  if normalize:
    arrays = {name: np.exp(x) for name, x in arrays.items()}
  arrays['v'] = normal(batch, length, heads, values)
  shape = {
    'constant': (heads,),
    'scalar': (batch, length, heads),
    'channel': (batch, length, heads, channels),
  }.get(gate)
  if shape:
    arrays['log_decay'] = -rng.exponential(0.3, shape).astype(dtype)
  if options.get('read') == 'exclusive':
    arrays['bonus'] = np.exp(normal(heads, channels))
  if state:
    memory = normal(batch, heads, channels, values)
    z = np.exp(normal(batch, heads, channels))
    arrays['initial_state'] = (memory, z) if normalize else memory
  if segments:
    # Boundaries everywhere, one-token segments and ids that come back.
    ids = np.cumsum(rng.random((batch, length)) < 0.2, axis=1) % 3
    options['segment_ids'] = ids.astype(np.int32)
  return arrays, options


def to_jax(tree):
  return jax.tree.map(jnp.asarray, tree)


STATIC = (
  'form',
  'chunk_size',
  'read',
  'normalize',
  'bidirectional',
  'scale',
)


@functools.partial(jax.jit, static_argnames=STATIC)
def apply(arrays, segment_ids=None, form='chunkwise', **options):
  return linear_attention(
    **arrays, segment_ids=segment_ids, form=form, **options
  )


@functools.partial(jax.jit, static_argnames=STATIC)
def vjp(arrays, cotangents, segment_ids=None, **options):
  """Output, state and the gradient of every array."""

  def call(arrays):
    return linear_attention(**arrays, segment_ids=segment_ids, **options)

  result, pull = jax.vjp(call, arrays)
  return *result, pull(cotangents)[0]


def cotangents_of(arrays, options, seed=1):
  out, state = oracle.linear_attention(**arrays, **options)
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.standard_normal(x.shape), (out, state))


def assert_close(actual, expected, tolerance):
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for x, y in zip(actual, expected, strict=True):
    assert x.shape == y.shape
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())
    )


@functools.cache
def reference(gate, feature, length):
  """Arrays, options, cotangents and float64 results of a case, all checked.

  The output and the state are those of the numpy loops; the gradients are
  autodiff of the recurrent form in float64, checked against central
  differences of the numpy loops.
  """
  kv_heads, state, segments, options = FEATURES[feature]
  arrays, options = make(
    gate,
    length,
    kv_heads=kv_heads,
    state=state,
    segments=segments,
    options=options,
  )
  cotangents = cotangents_of(arrays, options)
  with jax.enable_x64(True):
    out, state, grads = vjp(
      to_jax(arrays), to_jax(cotangents), form='recurrent', **options
    )
    grads = jax.tree.map(np.asarray, grads)
  expected = oracle.linear_attention(**arrays, **options)
  assert_close((out, state), expected, 1e-12)

  rng = np.random.default_rng(2)
  direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), arrays)

  def loss(step):
    moved = jax.tree.map(lambda x, d: x + step * d, arrays, direction)
    results = oracle.linear_attention(**moved, **options)
    return sum(
      np.vdot(x, y)
      for x, y in zip(
        jax.tree.leaves(results), jax.tree.leaves(cotangents), strict=True
      )
    )

  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  products = jax.tree.map(np.vdot, grads, direction)
  np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=1e-6)
  return arrays, options, cotangents, (*expected, grads)
