"""Every op with a matrix state at many lengths and chunks, for `--all`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import delta_rule_cases as delta
from tests.ops import linear_attention_cases as linear
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.optimized import optimized

pytestmark = pytest.mark.exhaustive

OPS = {'linear': linear.linear_attention, **delta.OPS}
CASES = [(op, gate) for op in sorted(OPS) for gate in delta.GATES]
# 1, 2, around a chunk of 16, primes, and several chunks with a rest.
LENGTHS = (1, 2, 3, 15, 16, 17, 31, 53, 67, 127, 257)
CHUNKS = (1, 2, 16, 64)


def make(op, gate, length):
  if op != 'linear':
    return delta.make(op, gate, length)
  return linear.make(gate, length, state=True)[0]


def programs(op):
  """One program with gradients, one with outputs of every form and chunk."""

  def apply(arrays, ids, form, chunk_size=64):
    return OPS[op](**arrays, segment_ids=ids, form=form, chunk_size=chunk_size)

  def gradients(arrays, cotangents, ids):
    found = []
    for form, size in (('recurrent', 64), ('chunkwise', 16)):
      result, pull = jax.vjp(
        lambda a, form=form, size=size: apply(a, ids, form, size), arrays
      )
      found.append((*result, pull(cotangents)[0]))
    return found

  def outputs(arrays, ids):
    found = [apply(arrays, ids, 'chunkwise', size) for size in CHUNKS]
    return [*found, apply(arrays, ids, 'parallel')]

  return [jax.jit(f) for f in (gradients, outputs)]


@pytest.mark.parametrize('op, gate', CASES)
@pytest.mark.parametrize('length', LENGTHS)
def test_every_form_and_chunk(op, gate, length):
  arrays = make(op, gate, length)
  shape = arrays['v'].shape
  rng = np.random.default_rng(length)
  cotangents = (
    rng.standard_normal(shape),
    rng.standard_normal((shape[0], shape[2], arrays['k'].shape[-1], shape[3])),
  )
  ids = delta.segments(length)
  gradients, outputs = programs(op)
  oracle = (
    linear.oracle.linear_attention if op == 'linear' else delta.ORACLES[op]
  )
  exact = oracle(**arrays, segment_ids=ids)
  with jax.enable_x64(True):
    arrays, cotangents = to_jax((arrays, cotangents))
    recurrent, chunkwise = gradients(arrays, cotangents, ids)
    assert_close(recurrent[:2], exact, 1e-11)
    assert_close(chunkwise, recurrent, 1e-9)
    for found in outputs(arrays, ids):
      assert_close(found, exact, 1e-10)


@pytest.mark.parametrize('op, gate', CASES)
def test_float32_and_bfloat16_at_length_4000(op, gate):
  arrays = make(op, gate, 4000)
  arrays['k'] /= np.linalg.norm(arrays['k'], axis=-1, keepdims=True)
  if op == 'dplr':
    # With unrelated a and b the states grow to 1e13, and so do errors.
    arrays['a'] /= np.linalg.norm(arrays['a'], axis=-1, keepdims=True)
    arrays['b'] = -arrays['a'] * np.abs(arrays['b']).clip(0, 2)
  if gate == 'none' and op == 'linear':
    pytest.skip('an ungated sum of 4000 tokens has no scale to compare with')
  run = optimized(
    lambda a: OPS[op](**a, form='chunkwise', chunk_size=64),
  )
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
    low = {
      name: jnp.asarray(
        x, jnp.float32 if name in ('log_decay', 'initial_state') else dtype
      )
      for name, x in arrays.items()
    }
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), low)
    with jax.enable_x64(True):
      expected = optimized(lambda a: OPS[op](**a, form='recurrent'))(
        to_jax(exact)
      )
      expected = jax.tree.map(np.asarray, expected)
    actual = jax.tree.map(lambda x: np.asarray(x, np.float64), run(low))
    for x, y in zip(actual, expected, strict=True):
      assert np.abs(x - y).max() <= tolerance * np.abs(y).max()
