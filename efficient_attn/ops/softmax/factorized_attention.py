"""The two patterns of the Sparse Transformer, as two attentions each.

    strided   |t - s| < stride, and t - s a multiple of stride
    fixed     the block of `stride` tokens of t, and the last `summary` tokens
              of every other block

(Child et al. 2019, https://arxiv.org/abs/1904.10509). Both halves of a pattern
are dense once tokens are put in order: by their class modulo the stride, by
blocks, by what is a summary. Their outputs join through their log denominators:
the result is that of `ops.attention` under `masks.Strided` or `masks.Fixed`,
the definitions, in O(T (stride + T / stride)) instead of O(T^2).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention_with_stats
from efficient_attn.ops.softmax.attention_merge import merge_attention
from efficient_attn.values import ConfigError


def strided_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K V'],
  *,
  stride: int,
  causal: bool,
  **options,
) -> Float[Array, 'B T N V']:
  """Attention to the last `stride` tokens and to every stride-th one.

  Args:
    query: queries.
    key: keys.
    value: values.
    stride: about the root of T.
    causal: whether later keys are left out.
    **options: `scale`, `logits_soft_cap` and `implementation` of attention.
  """
  _check(stride=stride)
  T = query.shape[1]
  right = 0 if causal else stride - 1
  near = attention_with_stats(
    query,
    key,
    value,
    mask=masks.Window(stride - 1, right),
    **options,
  )
  # The other tokens of a residue class: its own token is among the near ones.
  others = masks.Causal(-1) if causal else ~masks.Window(0, 0)
  if T % stride and not causal:
    others &= _real(_tokens(T, stride).T, query.shape[0])

  def classes(x):
    x = _cut(x, stride).swapaxes(1, 2)
    return x.reshape(-1, *x.shape[2:])

  far = attention_with_stats(
    *map(classes, (query, key, value)),
    mask=others,
    **options,
  )
  join = functools.partial(_join, stride=stride, T=T, classes=True)
  far = jax.tree.map(join, far)
  return _merged(near, far)


def fixed_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K V'],
  *,
  stride: int,
  summary: int,
  causal: bool,
  **options,
) -> Float[Array, 'B T N V']:
  """Attention to a block of `stride` tokens and the ends of the others.

  Args:
    query: queries.
    key: keys.
    value: values.
    stride: tokens of a block, about the root of T.
    summary: tokens at the end of every block that all others see.
    causal: whether later keys are left out.
    **options: `scale`, `logits_soft_cap` and `implementation` of attention.
  """
  _check(stride=stride, summary=summary)
  if summary > stride:
    raise ConfigError(
      f'summary = {summary} tokens at the end of a block are more than its'
      f' stride = {stride}.'
    )
  T = query.shape[1]
  num_blocks = -(-T // stride)
  own, others = None, ~np.eye(num_blocks, dtype=bool)
  if causal:
    own, others = masks.Causal(), np.tri(num_blocks, k=-1, dtype=bool)
  elif T % stride:
    own = _real(_tokens(T, stride), query.shape[0])

  def blocks(x):
    x = _cut(x, stride)
    return x.reshape(-1, *x.shape[2:])

  near = attention_with_stats(
    *map(blocks, (query, key, value)), mask=own, **options
  )
  join = functools.partial(_join, stride=stride, T=T, classes=False)
  near = jax.tree.map(join, near)

  def ends(x):
    x = _cut(x, stride)[:, :, stride - summary :]
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  mask = masks.Blocks(others, stride, summary)
  if T % stride:
    mask &= masks.Dense(_tokens(T, stride)[:, stride - summary :].reshape(-1))
  far = attention_with_stats(
    query, ends(key), ends(value), mask=mask, **options
  )
  return _merged(near, far)


def _check(**sizes):
  for name, size in sizes.items():
    if size < 1:
      raise ConfigError(f'{name} is {size}; it must be at least 1.')


def _tokens(T, stride):
  """Which places of the blocks that cover T hold a token: [blocks, stride]."""
  return (np.arange(T + -T % stride) < T).reshape(-1, stride)


def _real(tokens, B):
  """Admits tokens, in B sequences of as many parts as `tokens` has rows."""
  return masks.Dense(np.tile(tokens, (B, 1))[:, None, None])


def _cut(x, stride):
  """[B, T, ...] -> [B, T / stride, stride, ...], padded."""
  B, T = x.shape[:2]
  pad = [(0, 0), (0, -T % stride)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad).reshape(B, -1, stride, *x.shape[2:])


def _join(x, stride, T, classes):
  """Undoes `_cut`, of blocks or residue classes that are rows of a batch."""
  rows = stride if classes else -(-T // stride)
  x = x.reshape(-1, rows, *x.shape[1:])
  x = x.swapaxes(1, 2) if classes else x
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def _merged(*parts):
  return merge_attention(*jax.tree.map(lambda *x: jnp.stack(x), *parts))[0]
