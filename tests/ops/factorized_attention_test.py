import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention_reference import attention_reference
from efficient_attn.ops.softmax.factorized_attention import (
  fixed_attention,
  strided_attention,
)
from tests.ops.attention_blockwise_test import equations
from tests.ops.attention_cases import make_arrays
from tests.optimized import optimized

STRIDE, SUMMARY = 4, 2
OPS = {
  'strided': functools.partial(strided_attention, stride=STRIDE),
  'fixed': functools.partial(fixed_attention, stride=STRIDE, summary=SUMMARY),
}
RULES = {
  'strided': masks.Strided(STRIDE),
  'fixed': masks.Fixed(STRIDE, SUMMARY),
}


def definition(kind, causal, q, k, v, **options):
  mask = RULES[kind]
  mask = masks.Causal() & mask if causal else mask
  return attention_reference(q, k, v, mask=mask, **options)[0]


@pytest.mark.parametrize('T', [3, 12, 14])
def test_parts_are_the_whole(T):
  with jax.enable_x64(True):
    tensors = make_arrays(T, T, dtype=np.float64)
    weights = np.random.default_rng(1).standard_normal((2, T, 4, 3))
    cases = [(kind, causal) for kind in OPS for causal in (False, True)]
    options = dict(scale=0.8, logits_soft_cap=2.0)

    def run(op):
      def case_of(kind, causal):
        def loss(tensors):
          out = op(kind, causal, *tensors, **options)
          return jnp.sum(weights * out), out

        return jax.value_and_grad(loss, has_aux=True)

      def everything(tensors):
        return [case_of(*case)(tensors) for case in cases]

      return jax.jit(everything)(tensors)

    found = run(lambda kind, causal, *x, **o: OPS[kind](*x, causal=causal, **o))
    expected = run(definition)
    for x, y in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('kind', sorted(OPS))
def test_causal_to_the_bit(kind):
  q, k, v = make_arrays(14, 14)
  op = optimized(functools.partial(OPS[kind], causal=True))
  base = op(q, k, v)
  for cut in (1, 4, 6, 13):
    later = np.arange(14)[None, :, None, None] >= cut
    changed = op(*(jnp.where(later, 5 - 3 * x, x) for x in (q, k, v)))
    np.testing.assert_array_equal(
      changed[:, :cut], base[:, :cut], f'cut at {cut}'
    )


@pytest.mark.parametrize('kind', sorted(OPS))
def test_nothing_is_of_the_size_of_the_matrix(kind):
  """At stride = sqrt(T) every array has at most O(T^1.5) elements."""

  def largest(T):
    stride = int(np.sqrt(T))
    options = dict(summary=1) if kind == 'fixed' else {}
    op = functools.partial(
      OPS[kind].func, stride=stride, causal=True, **options
    )
    x = jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32)
    program = jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(op(*x))))(x, x, x)
    return max(
      out.aval.size for e in equations(program.jaxpr) for out in e.outvars
    )

  for T in (2**12, 2**14):
    assert largest(T) <= 2 * T**1.5


def test_errors():
  q, k, v = make_arrays(8, 8)
  with pytest.raises(ValueError, match='stride is 0'):
    strided_attention(q, k, v, stride=0, causal=True)
  with pytest.raises(ValueError, match='summary = 5 .* stride = 4'):
    fixed_attention(q, k, v, stride=4, summary=5, causal=True)
