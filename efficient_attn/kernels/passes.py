"""The passes of a recurrence of matrices, as calls of its kernels."""

import jax
import jax.numpy as jnp

from efficient_attn.kernels.layout import (
  Blocks,
  by_head,
  by_token,
  call,
  sum_parts,
)


def forward_pass(
  kernel, blocks: Blocks, q, k, v, gates, first, marks, *, dtype, save,
  **options,
):  # fmt: skip
  """Calls a kernel that takes (q, k, v, gates, first state, marks).

  Args:
    kernel: the body; its results are the outputs, the last state and, if
      `save`, the states before every chunk.
    blocks: the grid.
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    gates: pairs (array, block specification).
    first: the state before token 0, [B, N, *matrix].
    marks: like gates.
    dtype: of the outputs.
    save: whether to return the states before every chunk.
    **options: of `call`.

  Returns:
    out [B, T, K, G, V], the last state [B, N, *matrix] and, if `save`, the
    states [chunks, B, N, *matrix].
  """
  sizes, matrix = blocks.sizes, first.shape[2:]
  values = by_head(v, sizes, sizes.operand)
  value_spec = blocks.tokens(sizes.heads, sizes.width)
  outputs = [
    (values.shape, dtype, value_spec),
    (first.shape, jnp.float32, blocks.state(matrix)),
    ((sizes.chunks, *first.shape), sizes.operand, blocks.states(matrix)),
  ]
  out, *states = call(
    kernel,
    blocks,
    [
      (by_head(q, sizes, sizes.operand), blocks.keys()),
      (by_head(k, sizes, sizes.operand), blocks.keys()),
      (values, value_spec),
      *gates,
      (first, blocks.whole()),
      *marks,
    ],
    outputs if save else outputs[:2],
    **options,
  )
  return by_token(out, jax.ShapeDtypeStruct(v.shape, dtype)), *states


def backward_pass(
  kernel, blocks: Blocks, q, k, v, gates, states, marks, d_out, last, d_gates,
  **options,
):  # fmt: skip
  """Calls a kernel that takes (q, k, v, d_out, states, gates, last, marks).

  Args:
    kernel: the body; its results are the cotangents of q, k, v, what `d_gates`
      says and that of the first state.
    blocks: the grid.
    q: [B, T, K, H].
    k: [B, T, K, H].
    v: [B, T, K, G, V].
    gates: pairs (array, block specification).
    states: before every chunk, [chunks, B, N, *matrix].
    marks: like gates.
    d_out: the cotangent of the outputs.
    last: that of the last state, [B, N, *matrix].
    d_gates: triples (shape, dtype, block specification).
    **options: of `call`.

  Returns:
    The cotangents of q, k and v, those of the gates as `d_gates` says, and that
    of the first state.
  """
  sizes, matrix = blocks.sizes, last.shape[2:]
  keys, values = (by_head(x, sizes, sizes.operand) for x in (k, v))
  value_spec = blocks.tokens(sizes.heads, sizes.width)
  d_q, d_k, d_v, *others = call(
    kernel,
    blocks,
    [
      (by_head(q, sizes, sizes.operand), blocks.keys()),
      (keys, blocks.keys()),
      (values, value_spec),
      (by_head(d_out, sizes, sizes.operand), value_spec),
      (states.reshape(sizes.chunks, *last.shape), blocks.states(matrix)),
      *gates,
      (last, blocks.whole()),
      *marks,
    ],
    [
      *blocks.key_parts(q, k),
      (values.shape, v.dtype, value_spec),
      *d_gates,
      (last.shape, jnp.float32, blocks.state(matrix)),
    ],
    **options,
  )
  return (
    by_token(sum_parts(d_q, sizes), q),
    by_token(sum_parts(d_k, sizes), k),
    by_token(d_v, v),
    *others,
  )
