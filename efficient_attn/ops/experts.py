"""Sends tokens to experts and adds up what these return; none is dropped.

  y_t = sum_k weights_tk expert_{ids_tk}(x_t)

The rows of all tokens, one for each expert of a token, are sorted by expert, so
that each expert has one product with its rows, `grouped_dot`. Sorting is stable
and rows return by the inverse permutation: no scatter adds, and the result is
deterministic, forward and backward.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def mix_experts(
  x: Float[Array, 'M D'],
  ids: Int[Array, 'M k'],
  weights: Float[Array, 'M k'],
  expert: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  num_experts: int,
  first: int | jax.Array = 0,
) -> Float[Array, 'M D']:
  """Returns the sum of the experts of each token, by their weights.

  Args:
    x: tokens.
    ids: the experts of each token.
    weights: float32.
    expert: from rows [R, D] sorted by expert, and the number of rows of each,
      int32 [E], to rows [R, V]. Rows behind the last expert's are of no use.
    num_experts: E, how many experts `expert` has.
    first: the id of the first of them; tokens of other experts get zeros.
  """
  each = ids.shape[1]
  local = ids.reshape(-1) - first
  local = jnp.where((local < 0) | (local >= num_experts), num_experts, local)
  order = jnp.argsort(local, stable=True)
  counts = local[:, None] == jnp.arange(num_experts)
  sizes = jnp.sum(counts, axis=0, dtype=jnp.int32)
  rows = _permuted(jnp.repeat(x, each, axis=0), order)
  y = expert(rows, sizes)
  used = jnp.arange(len(local)) < jnp.sum(sizes)
  y = _permuted(jnp.where(used[:, None], y, 0), jnp.argsort(order))
  y = y.reshape(len(x), each, -1)
  return jnp.sum(weights[..., None] * y, axis=1).astype(x.dtype)


def _permuted(x, order):
  return x.at[order].get(unique_indices=True, mode='promise_in_bounds')


@jax.custom_vjp
def grouped_dot(
  rows: Float[Array, 'R D'],
  weights: Float[Array, 'E D F'],
  sizes: Int[Array, 'E'],
) -> Float[Array, 'R F']:
  """Multiplies the first sizes[0] rows by weights[0], the next by weights[1]...

  As `jax.lax.ragged_dot`, which `jax.vmap` cannot batch where the weights are
  the same for the whole batch: those rows are sorted together here.
  """
  return _grouped_dot(rows, weights, sizes)


def _forward(rows, weights, sizes):
  return _grouped_dot(rows, weights, sizes), (rows, weights, sizes)


def _backward(kept, dy):
  rows, weights, sizes = kept
  # The rows of each expert are contracted.
  dims = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  dweights = jax.lax.ragged_dot_general(rows, dy, sizes, dims)
  return grouped_dot(dy, jnp.swapaxes(weights, 1, 2), sizes), dweights, None


grouped_dot.defvjp(_forward, _backward)


@jax.custom_batching.custom_vmap
def _grouped_dot(rows, weights, sizes):
  return jax.lax.ragged_dot(rows, weights, sizes)


@_grouped_dot.def_vmap
def _batch(axis_size, in_batched, rows, weights, sizes):
  def batched(x, is_batched):
    return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

  rows, sizes = batched(rows, in_batched[0]), batched(sizes, in_batched[2])
  if in_batched[1]:
    return jax.vmap(jax.lax.ragged_dot)(rows, weights, sizes), True
  ends = jnp.cumsum(sizes, axis=1)
  places = jnp.arange(rows.shape[1])
  expert = jnp.sum(places[:, None] >= ends[:, None], axis=-1).reshape(-1)
  order = jnp.argsort(expert, stable=True)
  flat = _permuted(rows.reshape(-1, rows.shape[-1]), order)
  y = _grouped_dot(flat, weights, jnp.sum(sizes, axis=0))
  y = _permuted(y, jnp.argsort(order))
  return y.reshape(*rows.shape[:2], -1), True
