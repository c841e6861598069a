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
  kernel, blocks: Blocks, q, k, v, gates, state, marks, *, dtype, save,
  transposed=False, **options,
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
    state: before token 0, [B, K, G, H, V].
    marks: like gates.
    dtype: of the outputs.
    save: whether to return the states before every chunk.
    transposed: whether the kernel has states as [V, H], and saves them so.
    **options: of `call`.

  Returns:
    out [B, T, K, G, V], the last state [B, K, G, H, V] and, if `save`, the
    states [chunks, B, K, G, H, V], or [chunks, B, K, G, V, H].
  """
  sizes, first = blocks.sizes, _of_kernel(state, transposed)
  matrix = first.shape[2:]
  values = by_head(v, sizes, sizes.operand)
  value_spec = blocks.tokens(sizes.heads, sizes.width)
  outputs = [
    (values.shape, dtype, value_spec),
    (first.shape, jnp.float32, blocks.state(matrix)),
    ((sizes.chunks, *first.shape), sizes.operand, blocks.states(matrix)),
  ]
  out, last, *states = call(
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
  out = by_token(out, jax.ShapeDtypeStruct(v.shape, dtype))
  shape = (sizes.chunks, *state.shape[:-2], *matrix)
  states = (x.reshape(shape) for x in states)
  return out, _of_caller(last, state, transposed), *states


def _of_kernel(state, transposed):
  """[B, K, G, H, V] to [B, N, H, V], or [B, N, V, H]."""
  state = jnp.swapaxes(state, -1, -2) if transposed else state
  return state.reshape(len(state), -1, *state.shape[-2:])


def _of_caller(state, like, transposed):
  """The inverse."""
  state = jnp.swapaxes(state, -1, -2) if transposed else state
  return state.reshape(like.shape)


def backward_pass(
  kernel, blocks: Blocks, q, k, v, gates, states, marks, d_out, d_last, d_gates,
  *, transposed=False, **options,
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
    states: before every chunk, as `forward_pass` returns them.
    marks: like gates.
    d_out: the cotangent of the outputs.
    d_last: that of the last state, [B, K, G, H, V].
    d_gates: triples (shape, dtype, block specification).
    transposed: see `forward_pass`.
    **options: of `call`.

  Returns:
    The cotangents of q, k and v, those of the gates as `d_gates` says, and that
    of the first state.
  """
  sizes, last = blocks.sizes, _of_kernel(d_last, transposed)
  matrix = last.shape[2:]
  keys, values = (by_head(x, sizes, sizes.operand) for x in (k, v))
  value_spec = blocks.tokens(sizes.heads, sizes.width)
  d_q, d_k, d_v, *others, d_first = call(
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
    _of_caller(d_first, d_last, transposed),
  )
