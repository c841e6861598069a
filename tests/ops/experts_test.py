"""Tokens to experts and back: what each row is multiplied by, and its cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.models import cost
from efficient_attn.ops.experts import grouped_dot, mix_experts

M, K, E, D, F = 7, 2, 4, 3, 5


def problem():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((M, D)), jnp.float32)
  ids = jnp.asarray([rng.permutation(E)[:K] for _ in range(M)])
  weights = jnp.asarray(rng.random((M, K)), jnp.float32)
  w = jnp.asarray(rng.standard_normal((E, D, D)), jnp.float32)
  return x, ids, weights, w


def test_each_token_has_its_experts():
  x, ids, weights, w = problem()

  def expert(rows, sizes):
    return grouped_dot(rows, w, sizes)

  y = mix_experts(x, ids, weights, expert, num_experts=E)
  wanted = [
    sum(weights[t, k] * x[t] @ w[ids[t, k]] for k in range(K)) for t in range(M)
  ]
  np.testing.assert_allclose(y, jnp.stack(wanted), atol=1e-5)
  # As one of two devices has them: each half knows nothing of the other.
  halves = [
    mix_experts(
      x,
      ids,
      weights,
      lambda rows, sizes, i=i: grouped_dot(rows, w[i : i + 2], sizes),
      num_experts=2,
      first=i,
    )
    for i in (0, 2)
  ]
  np.testing.assert_allclose(halves[0] + halves[1], y, atol=1e-5)


def test_rows_of_no_expert_are_not_read():
  """Forward and backward, even if an implementation leaves them undefined."""
  x, ids, weights, w = problem()

  def run(x, weights):
    def expert(rows, sizes):
      y = grouped_dot(rows, w[:2], sizes)
      return jnp.where(jnp.arange(M * K)[:, None] < sizes.sum(), y, jnp.nan)

    y = mix_experts(x, ids, weights, expert, num_experts=2)
    return jnp.sum(y * y), y

  (dx, dw), y = jax.grad(run, (0, 1), has_aux=True)(x, weights)
  for found in (dx, dw, y):
    assert jnp.isfinite(found).all()


@pytest.mark.parametrize('shared', [True, False])
def test_a_batch_of_grouped_products(shared):
  """With the same weights for all, as decoded rows have, and with others."""
  rng = np.random.default_rng(0)
  sizes = jnp.asarray([[2, 0, 3, 1], [0, 6, 0, 0], [1, 1, 1, 1]])
  rows = jnp.asarray(rng.standard_normal((3, 6, D)), jnp.float32)
  weights = jnp.asarray(rng.standard_normal((3, 4, D, F)), jnp.float32)
  weights = weights[0] if shared else weights
  axes = (0, None if shared else 0, 0)
  found = jax.vmap(grouped_dot, axes)(rows, weights, sizes)
  for b, counts in enumerate(sizes):
    w = weights if shared else weights[b]
    start = 0
    for e, end in enumerate(np.cumsum(counts)):
      wanted = rows[b, start:end] @ w[e]
      np.testing.assert_allclose(found[b, start:end], wanted, atol=1e-5)
      start = end


def test_products_are_counted_once_a_row():
  x = jax.ShapeDtypeStruct((M, D), jnp.float32)
  w = jax.ShapeDtypeStruct((E, D, F), jnp.float32)
  sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
  forward = 2 * M * D * F
  assert cost.flops(grouped_dot, x, w, sizes) == forward
  assert cost.count(grouped_dot, x, w, sizes).flops == forward
  gradient = jax.grad(lambda x, w, s: grouped_dot(x, w, s).sum(), (0, 1))
  assert cost.flops(gradient, x, w, sizes) == 3 * forward
