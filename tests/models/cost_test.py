import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from efficient_attn import ops
from efficient_attn.models import cost

SIZE, PROGRAMS = 16, 8


def kernel(x_ref, y_ref, out_ref):
  out_ref[...] = jnp.dot(x_ref[...], y_ref[...])


@pytest.mark.parametrize('estimate', [None, 123])
def test_a_kernel_counts_its_estimate_or_its_grid(estimate):
  rows = pl.BlockSpec((SIZE, SIZE), lambda i: (i, 0))
  call = pl.pallas_call(
    kernel,
    grid=(PROGRAMS,),
    in_specs=[rows, pl.BlockSpec((SIZE, SIZE), lambda i: (0, 0))],
    out_specs=rows,
    out_shape=jax.ShapeDtypeStruct((PROGRAMS * SIZE, SIZE), jnp.float32),
    cost_estimate=estimate
    and pl.CostEstimate(flops=estimate, transcendentals=0, bytes_accessed=0),
  )

  def twice(x, y):
    body = lambda x, _: (call(x, y), None)  # noqa: E731
    return jax.lax.scan(body, x, None, length=2)[0]

  x = jax.ShapeDtypeStruct((PROGRAMS * SIZE, SIZE), jnp.float32)
  y = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.float32)
  expected = 2 * (estimate or PROGRAMS * 2 * SIZE**3)
  assert cost.flops(twice, x, y) == expected
  assert cost.count(twice, x, y).flops == expected


def test_an_op_with_a_kernel_counts_its_definition():
  x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.float32)
  found = []
  for implementation in (None, 'xla', 'pallas_tpu'):

    def loss(q, implementation=implementation):
      out, _ = ops.linear_attention(
        q, q, q, form='chunkwise', implementation=implementation
      )
      return jnp.sum(out)

    found.append((cost.flops(loss, x), cost.flops(jax.grad(loss), x)))
  (forward, gradient), plain, named = found
  assert found[0] == named and forward == plain[0]
  # The states within a span of two chunks are computed again.
  assert plain[1] <= gradient < 1.1 * plain[1]
