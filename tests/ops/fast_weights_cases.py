"""Calls of fast_weights and lact and what they should give, for their tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.recurrent.fast_weights import FastState, fast_weights
from efficient_attn.ops.recurrent.lact import (
  LactState,
  large_chunk_fast_weights,
)
from tests.oracles import fast_weights as oracle

CHUNK = 4
BATCH, HEADS, CHANNELS = 2, 2, 3

# name: (values, hidden, norm, bias, gates)
FAST = {
  'linear': (CHANNELS, (), True, True, False),
  'linear_l2': (5, (), False, False, False),
  'mlp': (CHANNELS, (4,), True, True, False),
  'ttt': (CHANNELS, (), True, True, False),  # with shares
  'titans': (5, (), False, False, True),
  'titans_mlp': (5, (4,), False, False, True),
}
# name: (with momentum, with Muon)
LACT = {'lact': (False, False), 'lact_muon': (True, True)}
KINDS = (*FAST, *LACT)


def op_of(kind):
  return large_chunk_fast_weights if kind in LACT else fast_weights


def oracle_of(kind):
  return oracle.lact if kind in LACT else oracle.fast_weights


def make(kind, length, *, state=False, batch=BATCH, seed=0, dtype=np.float64):
  """The arrays of one call, and the state to start from (or None)."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
  uniform = lambda *shape: rng.uniform(0.05, 1, shape).astype(dtype)  # noqa: E731
  shape = (batch, length, HEADS)
  arrays = {'q': normal(*shape, CHANNELS), 'k': normal(*shape, CHANNELS)}
  started = None
  if kind in LACT:
    momentum, _ = LACT[kind]
    arrays['v'] = normal(*shape, 5)
    arrays['learning_rate'] = uniform(*shape, 3)
    sizes = ((CHANNELS, 4), (4, 5), (CHANNELS, 4))
    arrays['weights'] = tuple(normal(HEADS, *size) for size in sizes)
    if momentum:
      arrays['momentum'] = uniform(*shape)
    if state:
      parts = [
        tuple(normal(batch, HEADS, *size) for size in sizes) for _ in range(3)
      ]
      share = uniform(batch, HEADS)
      if not momentum:
        parts[2], share = None, None
      started = LactState(*parts, share, _counts(batch))
  else:
    values, hidden, norm, bias, gates = FAST[kind]
    arrays['v'] = normal(*shape, values)
    arrays['learning_rate'] = 0.1 * uniform(*shape)
    widths = (CHANNELS, *hidden, values)

    def layers(*lead):
      return tuple(
        (normal(*lead, i, o), normal(*lead, o) if bias else None)
        for i, o in zip(widths[:-1], widths[1:], strict=True)
      )

    arrays['weights'] = layers(HEADS)
    if norm:
      arrays['norm'] = (normal(HEADS, values), normal(HEADS, values))
    if kind == 'ttt':
      arrays['shares'] = uniform(CHUNK)
    if gates:
      arrays['log_decay'] = np.log(uniform(*shape))
      arrays['log_momentum'] = np.log(uniform(*shape))
    if state:
      parts = [layers(batch, HEADS) for _ in range(3)]
      if not gates:
        parts[2] = None
      started = FastState(*parts, _counts(batch))
  return arrays, started


def _counts(batch):
  # A mini-batch that is over, one under way.
  return np.resize(np.array([CHUNK, 3], np.int32), batch)


def segments(length, batch=BATCH, seed=0):
  """Boundaries everywhere, one-token segments and ids that come back."""
  rng = np.random.default_rng(seed)
  ids = np.cumsum(rng.random((batch, length)) < 0.25, axis=1) % 3
  return ids.astype(np.int32)


def options_of(kind):
  if kind in LACT:
    return {'use_muon': LACT[kind][1]}
  return {'activation': 'silu'} if kind == 'titans_mlp' else {}


def expected_of(kind, arrays, state=None, ids=None, **options):
  options = {'chunk_size': CHUNK, **options_of(kind), **options}
  return oracle_of(kind)(
    **arrays, initial_state=state, segment_ids=ids, **options
  )


def to_jax(tree):
  return jax.tree.map(jnp.asarray, tree)


def call(kind, arrays, state=None, ids=None, **options):
  options = {'chunk_size': CHUNK, **options_of(kind), **options}
  return op_of(kind)(**arrays, initial_state=state, segment_ids=ids, **options)


STATIC = ('kind', 'form', 'chunk_size', 'bidirectional')
apply = functools.partial(jax.jit, static_argnames=STATIC)(call)


def without_count(state):
  """The floating parts of a state: those with gradients."""
  return None if state is None else tuple(state)[:-1]


@functools.partial(jax.jit, static_argnames=STATIC)
def vjp(kind, arrays, cotangents, state=None, ids=None, **options):
  """Output, state, and the gradients of every array and of the state."""

  def floating(arrays, parts):
    started = None if state is None else type(state)(*parts, state[-1])
    out, last = call(kind, arrays, started, ids, **options)
    return (out, without_count(last)), last

  (out, _), pull, last = jax.vjp(
    floating, arrays, without_count(state), has_aux=True
  )
  return out, last, pull(cotangents)


def cotangents_of(result, seed=1):
  rng = np.random.default_rng(seed)
  out, state = result
  return jax.tree.map(
    lambda x: rng.standard_normal(np.shape(x)), (out, without_count(state))
  )


def assert_close(actual, expected, tolerance):
  actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
  assert len(actual) == len(expected)
  for x, y in zip(actual, expected, strict=True):
    assert x.shape == np.shape(y)
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())
    )
