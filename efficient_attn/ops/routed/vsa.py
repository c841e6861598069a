"""Video sparse attention, VSA (Zhang et al. 2505.13389).

    o_t = g^c_t o^c_{cube(t)} + g^f_t o^f_t

Tokens of a 3-D grid are cut into cubes. The coarse o^c is attention between the
means of the cubes' queries, keys and values; the fine o^f is attention to the
tokens of the `top_k` cubes that the coarse one gives most weight, for all
queries of a cube alike. O(T top_k C H) time for cubes of C tokens, and
O((T / C)^2 H) for the coarse branch.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_attn.ops.products import product
from efficient_attn.ops.routed.selected_blocks import (
  block_attention,
  top_blocks,
)
from efficient_attn.values import ConfigError


def vsa_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K V'],
  coarse_gate: Float[Array, 'B T N V'],
  fine_gate: Float[Array, 'B T N V'],
  *,
  cubes: Int[np.ndarray, 'I C'],
  top_k: int,
) -> Float[Array, 'B T N V']:
  """The gated sum of both branches.

  Args:
    query: queries.
    key: keys.
    value: values.
    coarse_gate: factors of the coarse branch.
    fine_gate: factors of the fine branch.
    cubes: the tokens of every cube, by `cut`.
    top_k: cubes of a cube of queries.

  Returns:
    The output, in the query's dtype.
  """
  B, T, N, H = query.shape
  there = cubes >= 0
  if there.sum() != T:
    raise ConfigError(
      f'the grid has {there.sum()} cells but T = {T}; they must be equal.'
    )
  key, value = (jnp.repeat(x, N // x.shape[2], 2) for x in (key, value))
  number, size = cubes.shape
  home = np.zeros(T, np.int32)
  home[cubes[there]] = np.nonzero(there)[0]
  stats = jnp.promote_types(query.dtype, jnp.float32)

  def means(x):
    x = jnp.where(there[..., None, None], x[:, cubes], 0)
    return jnp.sum(x, 2, dtype=stats) / there.sum(1)[:, None, None]

  logits = H**-0.5 * product('binh,bjnh->bnij', means(query), means(key))
  coarse = product('bnij,bjnv->binv', jax.nn.softmax(logits), means(value))
  blocks = top_blocks(logits, True, top_k)
  fine, _, _ = block_attention(
    query,
    key,
    value,
    jnp.moveaxis(blocks, 1, 2)[:, home],
    block_size=size,
    members=jnp.broadcast_to(cubes, (B, N, number, size)),
  )
  out = coarse_gate * coarse[:, home].astype(query.dtype) + fine_gate * fine
  return out.astype(query.dtype)


def cut(grid: tuple[int, ...], cube: tuple[int, ...]) -> Int[np.ndarray, 'I C']:
  """The cells of every cube of a row-major grid, -1 beyond its border."""
  if len(grid) != len(cube) or min(*grid, *cube) < 1:
    raise ConfigError(
      f'grid {grid} and cube {cube} must have as many axes, of 1 or more.'
    )
  padded = [-(-g // c) * c for g, c in zip(grid, cube, strict=True)]
  cells = np.full(padded, -1, np.int32)
  cells[tuple(map(slice, grid))] = np.arange(math.prod(grid)).reshape(grid)
  split = [(p // c, c) for p, c in zip(padded, cube, strict=True)]
  cells = cells.reshape(list(itertools.chain(*split)))
  axes = len(grid)
  order = [*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)]
  return cells.transpose(order).reshape(-1, math.prod(cube))
