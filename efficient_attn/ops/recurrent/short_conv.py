"""Causal depthwise convolution over a few tokens, before linear attention.

  y_t = bias + sum_{i < W} weight_i * x_{t - (W - 1) + i},

the token mixing of H3 (2212.14052) and Mamba (2312.00752). Written as W
shifted products: on CPU an order of magnitude faster than a grouped
convolution. O(T W D) time, a state of W - 1 inputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks


def short_conv(
  x: Float[Array, 'B T D'],
  weight: Float[Array, 'W D'],
  *,
  bias: Float[Array, 'D'] | None = None,
  initial_state: Float[Array, 'B W-1 D'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B W-1 D']]:
  """Convolves every channel with its own W taps; the last tap is the present.

  Args:
    x: inputs.
    weight: taps, oldest first: weight[W - 1] multiplies x_t.
    bias: added to every output.
    initial_state: the W - 1 inputs before token 0, oldest first, part of the
      first segment; zeros by default.
    segment_ids: taps do not reach past a token whose id differs from the id
      of the token before it.

  Returns:
    y: [B, T, D] in the dtype of x; sums are in float32 at least.
    state: [B, W - 1, D] in the dtype of x, the last inputs, zero where they
      belong to an earlier segment. As `initial_state` of the next call it
      continues the sequence.
  """
  _check(x, weight, bias, initial_state, segment_ids)
  batch, length, width = x.shape
  taps = weight.shape[0]
  dtype = jnp.promote_types(jnp.result_type(x, weight), jnp.float32)
  if initial_state is None:
    initial_state = jnp.zeros((batch, taps - 1, width), x.dtype)
  inputs = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
  counts = None
  if segment_ids is not None:
    counts = chunks.segment_counts(segment_ids)
    counts = jnp.pad(counts, ((0, 0), (taps - 1, 0)))

  out = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
  for i in range(taps):
    tap = inputs[:, i : i + length].astype(dtype) * weight[i].astype(dtype)
    if counts is not None:
      same = counts[:, i : i + length] == counts[:, taps - 1 :]
      tap = jnp.where(same[..., None], tap, 0)
    out = out + tap

  state = inputs[:, length:]
  if counts is not None:
    same = counts[:, length:] == counts[:, -1:]
    state = jnp.where(same[..., None], state, 0)
  return out.astype(x.dtype), state


def _check(x, weight, bias, initial_state, segment_ids):
  if x.ndim != 3 or x.shape[1] == 0:
    raise ValueError(f'x has shape {x.shape}: pass [batch, length >= 1, D].')
  batch, length, width = x.shape
  if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != width:
    raise ValueError(
      f'weight has shape {weight.shape}: pass [taps >= 1, D = {width}].'
    )
  wanted = {
    'bias': (bias, (width,)),
    'initial_state': (initial_state, (batch, weight.shape[0] - 1, width)),
    'segment_ids': (segment_ids, (batch, length)),
  }
  for name, (array, shape) in wanted.items():
    if array is not None and array.shape != shape:
      raise ValueError(f'{name} has shape {array.shape}: pass {shape}.')
