"""Native sparse attention, NSA (Yuan et al. 2502.11089).

    o_t = g^cmp_t o^cmp_t + g^slc_t o^slc_t + g^win_t o^win_t

three softmax attentions with keys and values of their own:

  compressed  one key and one value for the l tokens from i d on, where they are
              all in the past: W_2 silu(sum_j W_1j (k_{id+j} + e_j));
  selected    the tokens of the `top_k` best blocks of l' tokens; the first
              block, the query's own and the one before it are always taken;
  window      the last w tokens.

The score of block j is the weight that the compressed attention of all heads
of a group gives to it, p_i counted once for every stride d of l' that shares
one of the l / d strides of i:

    score_j = sum_heads sum_{m < l'/d} sum_{n < l/d} p_{j l'/d + m - n}.

(The paper counts i and j from 1.) O(T (l' top_k + w) H) time, and O(T (T / d)
H) for the compressed branch, little at first but quadratic; O(T H) memory.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from efficient_attn.ops import masks
from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  causal_bias,
  positions,
  top_blocks,
)
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.normalizers import softmax
from efficient_attn.values import ConfigError

INITIAL, LOCAL = 1, 2  # blocks that are always selected
CHUNK = 128  # queries whose weights of compressed keys are held at once
SPANS = 4  # parts of the length that leave later compressed keys alone


class Sizes(NamedTuple):
  """Tokens of l, d, l' and w, and how many blocks are selected."""

  compress_size: int
  compress_stride: int
  block_size: int
  top_k: int
  window: int


class Compressor(NamedTuple):
  """The MLP that makes one key or value of l."""

  places: Float[Array, 'L H']
  up: Float[Array, 'L H F']
  down: Float[Array, 'F V']


def nsa_attention(
  query: Float[Array, 'B T N H'],
  plain_query: Float[Array, 'B T N H'],
  compressed: tuple[Float[Array, 'B I K H'], Float[Array, 'B I K V']],
  selected: tuple[Float[Array, 'B S K H'], Float[Array, 'B S K V']],
  window: tuple[Float[Array, 'B W K H'], Float[Array, 'B W K V']],
  gates: Float[Array, 'B T N 3'],
  *,
  sizes: Sizes,
  offset: int | Int[Array, ''] = 0,
  behind: int = 0,
) -> Float[Array, 'B T N V']:
  """The gated sum of the three branches.

  Args:
    query: queries of the selected and the window branch, rotated.
    plain_query: queries of the compressed branch, not rotated.
    compressed: keys and values of the compressed branch, by `compress`.
    selected: keys and values of the selected branch.
    window: keys and values of the window branch.
    gates: the factors of the three branches.
    sizes: see the module docstring.
    offset: the index of the first query among the selected keys.
    behind: the index of the first query among the window's keys, of which
      only the last `offset` before it count.

  Returns:
    The output, in the query's dtype.
  """
  check_sizes(sizes)
  T, S = query.shape[1], selected[0].shape[1]
  number = -(-S // sizes.block_size)
  first, blocks = compressed_attention(
    plain_query, *compressed, sizes=sizes, num_blocks=number, offset=offset
  )
  second, _, _ = block_attention(
    query,
    *selected,
    blocks,
    block_size=sizes.block_size,
    bias=causal_bias,
    query_marks=positions(T, offset),
    key_marks=positions(S),
  )
  near = masks.Window(sizes.window - 1, 0, behind)
  if behind:
    there = jnp.arange(window[0].shape[1]) >= behind - offset
    near &= masks.Dense(there[None, None, None])
  third = attention(query, *window, mask=near)
  branches = jnp.stack([first, second, third], -1)
  return jnp.einsum('btnvc,btnc->btnv', branches, gates.astype(query.dtype))


def compressed_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B I K H'],
  value: Float[Array, 'B I K V'],
  *,
  sizes: Sizes,
  num_blocks: int,
  offset: int | Int[Array, ''] = 0,
) -> tuple[Float[Array, 'B T N V'], Int[Array, 'B T K J']]:
  """Attention to compressed tokens, and the blocks it selects.

  Returns:
    The output, zeros where no compressed token is in the past, and the blocks
    of every group of heads, -1 where there are fewer than `top_k`.
  """
  B, T, N, H = query.shape
  K, V = value.shape[2:]
  size = min(T, CHUNK)
  number = -(-T // size)
  place = offset + jnp.arange(number * size)
  query = jnp.pad(query, ((0, 0), (0, number * size - T), (0, 0), (0, 0)))
  query = query.reshape(B, number, size, K, N // K, H)
  chunks = jnp.moveaxis(query, 1, 0), place.reshape(number, size)
  spans = SPANS if isinstance(offset, int) and number >= 4 * SPANS else 1
  found = []
  for start, stop in itertools.pairwise(
    number * i // spans for i in range(spans + 1)
  ):
    keys = key.shape[1]
    if spans > 1:  # those that the last query of the span may see
      keys = min(keys, (offset + stop * size) // sizes.compress_stride)
    run = functools.partial(
      _compressed,
      key=key[:, :keys],
      value=value[:, :keys],
      sizes=sizes,
      num_blocks=num_blocks,
    )
    part = tuple(x[start:stop] for x in chunks)
    found.append(lax.map(jax.checkpoint(run), part))
  out, blocks = (
    jnp.moveaxis(jnp.concatenate(parts), 0, 1)
    for parts in zip(*found, strict=True)
  )
  out = out.reshape(B, -1, N, V)[:, :T]
  return out, blocks.reshape(B, number * size, K, -1)[:, :T]


def _compressed(chunk, *, key, value, sizes, num_blocks):
  """The same for queries [B, C, K, G, H] at the positions [C]."""
  query, place = chunk
  B, C, K, G, H = query.shape
  query = query.transpose(0, 2, 3, 1, 4).reshape(B, K, G * C, H)
  logits = H**-0.5 * product('bkrh,bikh->bkri', query, key)
  ends = jnp.arange(key.shape[1]) * sizes.compress_stride
  past = ends + sizes.compress_size - 1 <= place[:, None]
  logits = logits.reshape(B, K, G, C, -1)
  weights = softmax(logits, past)
  out = product(
    'bkrc,bckv->bkrv',
    weights.reshape(B, K, G * C, -1),
    value,
    operand=value.dtype,
  )
  out = out.reshape(B, K, G, C, -1).transpose(0, 3, 1, 2, 4)

  scores = block_scores(jnp.sum(weights, 2), sizes, num_blocks)
  own = (place // sizes.block_size)[:, None]
  index = jnp.arange(num_blocks)
  forced = (index < INITIAL) | (index > own - LOCAL)
  blocks = top_blocks(
    scores, index <= own, sizes.top_k, forced=forced & (index <= own)
  )
  return out.astype(query.dtype), blocks.transpose(0, 2, 1, 3)


def block_scores(
  weights: Float[Array, '*rows I'], sizes: Sizes, num_blocks: int
) -> Float[Array, '*rows J']:
  """The weights of compressed tokens, gathered by the blocks they overlap."""
  shared = sizes.compress_size // sizes.compress_stride
  per_block = sizes.block_size // sizes.compress_stride
  shape = *weights.shape[:-1], num_blocks, per_block
  scores = 0
  for back in range(shared):
    widths = [(0, 0)] * (weights.ndim - 1) + [(back, num_blocks * per_block)]
    shifted = jnp.pad(weights, widths)[..., : num_blocks * per_block]
    scores += shifted.reshape(shape).sum(-1)
  return scores


def frames(
  x: Float[Array, 'B S *rest'], sizes: Sizes
) -> Float[Array, 'B I L *rest']:
  """The l tokens from every d-th on; zeros follow the last token."""
  size, stride = sizes.compress_size, sizes.compress_stride
  number = -(-x.shape[1] // stride)
  room = (number - 1) * stride + size - x.shape[1]
  x = jnp.pad(x, [(0, 0), (0, max(room, 0))] + [(0, 0)] * (x.ndim - 2))
  parts = [
    x[:, start : start + number * stride].reshape(
      x.shape[0], number, stride, *x.shape[2:]
    )
    for start in range(0, size, stride)
  ]
  return jnp.concatenate(parts, 2)


def new_frames(
  x: Float[Array, 'B S *rest'],
  length: int,
  offset: Int[Array, ''],
  sizes: Sizes,
) -> tuple[Float[Array, 'B I L *rest'], Int[Array, 'I'], Bool[Array, 'I']]:
  """The frames that end in the last `length` tokens of x, from `offset` on.

  Returns:
    The frames, their indices in the whole sequence, and which there are.
  """
  size, stride = sizes.compress_size, sizes.compress_stride
  before = x.shape[1] - length
  first = jnp.maximum(-((size - 1 - offset) // stride), 0)
  index = first + jnp.arange(length // stride + 1)
  start = index * stride - offset + before
  found = x[:, start[:, None] + jnp.arange(size)]
  return found, index, start + size <= x.shape[1]


def compress(
  tokens: Float[Array, 'B I L K H'], weights: Compressor
) -> Float[Array, 'B I K V']:
  """One key or value for every frame of tokens."""
  tokens = tokens + weights.places[:, None]
  hidden = jax.nn.silu(jnp.einsum('bilkh,lhf->bikf', tokens, weights.up))
  return jnp.einsum('bikf,fv->bikv', hidden, weights.down)


def check_sizes(sizes: Sizes) -> None:
  """Refuses sizes that do not fit each other."""
  stride = sizes.compress_stride
  for name in ('compress_size', 'block_size'):
    size = getattr(sizes, name)
    if size < stride or size % stride:
      raise ConfigError(
        f'{name} is {size}; it must be a multiple of compress_stride ='
        f' {stride}.'
      )
  if sizes.top_k < INITIAL + LOCAL:
    raise ConfigError(
      f'top_k is {sizes.top_k}; it must be at least {INITIAL + LOCAL}, the'
      ' blocks that are always selected.'
    )
  if sizes.window < 1:
    raise ConfigError(f'window is {sizes.window}; it must be at least 1.')
