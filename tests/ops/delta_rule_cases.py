"""Calls of delta_rule and dplr and what they should give, for their tests."""

import functools

import jax
import numpy as np

from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.dplr import dplr
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.oracles import delta_rule as oracle

OPS = {'delta': delta_rule, 'erase': delta_rule, 'dplr': dplr}
ORACLES = {
  'delta': oracle.delta_rule,
  'erase': oracle.delta_rule,
  'dplr': oracle.dplr,
}
GATES = ('none', 'constant', 'scalar', 'channel')
CHUNK = 4
LENGTH = 3 * CHUNK + 5
BATCH, HEADS, CHANNELS, VALUES = 2, 4, 3, 5
CASES = [(op, gate) for op in OPS for gate in GATES]
STATIC = ('op', 'form', 'chunk_size', 'read', 'bidirectional')


def make(op, gate, length=LENGTH, *, kv_heads=2, state=True, seed=0):
  """Arrays of a call; keys have about unit length."""
  rng = np.random.default_rng(seed)
  normal = rng.standard_normal
  keys = (BATCH, length, kv_heads, CHANNELS)
  arrays = {
    'q': normal(keys),
    'k': normal(keys) / CHANNELS**0.5,
    'v': normal((BATCH, length, HEADS, VALUES)),
  }
  if op == 'dplr':
    arrays['a'] = normal(keys) / CHANNELS**0.5
    arrays['b'] = -normal(keys) / CHANNELS**0.5
  else:
    arrays['beta'] = rng.uniform(0, 2, (BATCH, length, HEADS))
  if op == 'erase':
    arrays['erase'] = rng.uniform(0, 1, (BATCH, length, HEADS, CHANNELS))
  shape = {
    'constant': (HEADS,),
    'scalar': (BATCH, length, HEADS),
    'channel': (BATCH, length, HEADS, CHANNELS),
  }.get(gate)
  if shape:
    arrays['log_decay'] = -rng.exponential(0.3, shape)
  if state:
    arrays['initial_state'] = normal((BATCH, HEADS, CHANNELS, VALUES))
  return arrays


def segments(length=LENGTH, seed=5):
  """Boundaries everywhere, one-token segments and ids that come back."""
  rng = np.random.default_rng(seed)
  return (np.cumsum(rng.random((BATCH, length)) < 0.2, 1) % 3).astype(np.int32)


def cotangents(length=LENGTH, seed=6):
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal((BATCH, length, HEADS, VALUES)),
    rng.standard_normal((BATCH, HEADS, CHANNELS, VALUES)),
  )


@functools.partial(jax.jit, static_argnames=STATIC)
def apply(arrays, segment_ids=None, *, op, form='chunkwise', **options):
  return OPS[op](**arrays, segment_ids=segment_ids, form=form, **options)


@functools.partial(jax.jit, static_argnames=STATIC)
def vjp(arrays, cotangents, segment_ids=None, *, op, **options):
  def call(arrays):
    return OPS[op](**arrays, segment_ids=segment_ids, **options)

  result, pull = jax.vjp(call, arrays)
  if options.get('bidirectional'):
    cotangents = cotangents[0], None
  return *result, pull(cotangents)[0]


@functools.cache
def reference(op, gate, options=()):
  """Arrays and float64 results of a case: outputs of the numpy loops.

  Gradients are those of the recurrent form, checked against central
  differences of the numpy loops.
  """
  options = dict(options)
  arrays = make(op, gate, state='bidirectional' not in options)
  ids = segments()
  with jax.enable_x64(True):
    result = vjp(
      to_jax(arrays), to_jax(cotangents()), ids, op=op, form='recurrent',
      **options,
    )  # fmt: skip
    result = jax.tree.map(np.asarray, result)
  expected = ORACLES[op](**arrays, segment_ids=ids, **options)
  assert_close(result[:2], expected, 1e-12)
  rng = np.random.default_rng(2)
  direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), arrays)

  def loss(step):
    moved = jax.tree.map(lambda x, d: x + step * d, arrays, direction)
    out, state = ORACLES[op](**moved, segment_ids=ids, **options)
    total = np.vdot(out, cotangents()[0])
    return total if state is None else total + np.vdot(state, cotangents()[1])

  slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
  products = jax.tree.leaves(jax.tree.map(np.vdot, result[2], direction))
  np.testing.assert_allclose(sum(products), slope, rtol=1e-6)
  return arrays, result
