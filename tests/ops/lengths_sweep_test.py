"""The recurrences without a plain matrix state at many lengths, for `--all`.

`sweep_test` is the same of linear attention and the delta rule.
"""

import jax
import numpy as np
import pytest

from tests.ops import elementwise_cases as elementwise
from tests.ops import gated_recurrences_test as gated
from tests.ops import log_linear_test as log_linear
from tests.ops import mesa_test as mesa
from tests.ops.elementwise_cases import assert_close, to_jax

pytestmark = pytest.mark.exhaustive

# Around chunks of 16 and 64, primes, and several chunks with a rest.
LENGTHS = (17, 31, 64, 65, 127, 257)
CHUNKS = (16, 64)


def of_gated(name):
  op, oracle, _ = gated.OPS[name]
  return lambda T: gated.make(name, T), op, oracle


def of_elementwise(name):
  def call(chunk_size, form, segment_ids, **arrays):
    options = {'chunk_size': chunk_size} if name != 'slstm' else {}
    return elementwise.call(
      name, arrays, segment_ids=segment_ids, form=form, **options
    )

  def oracle(segment_ids, **arrays):
    return elementwise.expected(name, arrays, segment_ids)

  return lambda T: elementwise.make(name, T), call, oracle


def of_log_linear():
  def make(T):
    return log_linear.make(T, levels=10), log_linear.make_ids(T)

  def call(**arguments):
    out, (memory, _) = log_linear.log_linear_attention(**arguments)
    return out, memory

  def oracle(**arguments):
    out, (memory, _) = log_linear.oracle.log_linear_attention(**arguments)
    return out, memory

  return make, call, oracle


def of_mesa():
  return (
    lambda T: (mesa.make(T), mesa.make_ids(T)),
    mesa.mesa_recurrence,
    mesa.oracle.mesa,
  )


# Name -> (length to arrays and segment ids, op, numpy loops).
OPS = {
  **{name: of_gated(name) for name in gated.OPS},
  **{name: of_elementwise(name) for name in elementwise.CASES},
  'log_linear': of_log_linear(),
  'mesa': of_mesa(),
}
RUNS = {
  name: [('recurrent', 64)]
  if elementwise.FORMS.get(name) == ('recurrent',)
  else [('recurrent', 64), *(('chunkwise', size) for size in CHUNKS)]
  for name in OPS
}


def gradients(name, run, ids):
  """A function of (arrays, cotangents): results and their gradients."""
  form, size = run
  op = OPS[name][1]

  def call(arrays):
    return op(**arrays, segment_ids=ids, form=form, chunk_size=size)

  def found(arrays, cotangents):
    result, pull = jax.vjp(call, arrays)
    return result, pull(cotangents)[0]

  return found


@pytest.mark.parametrize('name', OPS)
@pytest.mark.parametrize('length', LENGTHS)
def test_every_form_and_chunk(name, length):
  make, _, oracle = OPS[name]
  arrays, ids = make(length)
  exact = oracle(**arrays, segment_ids=ids)
  rng = np.random.default_rng(length)
  cotangents = jax.tree.map(lambda x: rng.standard_normal(np.shape(x)), exact)
  with jax.enable_x64(True):
    given = to_jax((arrays, cotangents))
    first = None
    for run in RUNS[name]:
      call = gradients(name, run, jax.numpy.asarray(ids))
      result, grads = jax.jit(call)(*given)
      assert_close(result, exact, 1e-9)
      first = grads if first is None else first
      assert_close(grads, first, 1e-8)
