"""Position encodings that act on arrays rather than on scores.

Rotary (Su et al. 2021), sinusoidal (Vaswani et al. 2017), and the fixed 2-D
sine-cosine table of plain ViTs (Chen et al. 2021; Beyer et al. 2022). All are
computed in at least float32: bfloat16 cannot tell positions past 256 apart.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from efficient_attn.values import ConfigError


def _frequencies(count, base, dtype):
  """base^(-i / count) for i < count."""
  return base ** (-jnp.arange(count, dtype=dtype) / count)


def rotary(
  x: Float[Array, 'B T N H'],
  positions: Num[Array, 'B T'] | Num[Array, 'T'],
  *,
  base: float = 10000.0,
  fraction: float = 1.0,
  frequencies: Float[Array, 'F'] | None = None,
  factor: float = 1.0,
  interleaved: bool = False,
) -> Float[Array, 'B T N H']:
  """Rotates pairs of channels by angles proportional to the position.

  Pairs are (i, i + R/2) in the first R = fraction * H channels, the
  non-interleaved halves of Llama and GPT-NeoX, not the adjacent channels of
  the paper: a fixed permutation of channels apart. With f_i = base^(-2i/R),

    y_i       = x_i cos(p f_i) - x_{i+R/2} sin(p f_i)
    y_{i+R/2} = x_{i+R/2} cos(p f_i) + x_i sin(p f_i)

  so that the product of a rotated query and key depends on their positions
  only through the difference. RoFormer, https://arxiv.org/abs/2104.09864.

  Args:
    x: queries or keys.
    positions: integer or fractional positions, per sequence or shared.
    base: wavelength of the slowest pair over 2 pi, as H grows.
    fraction: share of the channels that rotates (partial rotary).
    frequencies: f_i in place of those of `base`, R/2 of them.
    factor: of the rotated channels.
    interleaved: pairs are (2i, 2i+1), as in the paper.

  Returns:
    The rotated array, in the dtype of `x`.
  """
  H = x.shape[-1]
  rotated = int(H * fraction)
  if not 0 < fraction <= 1 or rotated % 2:
    raise ConfigError(
      f'fraction {fraction} of H = {H} rotates {rotated} channels; it must be'
      ' in (0, 1] and give an even number.'
    )
  if positions.shape not in (x.shape[1:2], x.shape[:2]):
    raise ValueError(
      f'positions of shape {positions.shape} must be [T] = {x.shape[1:2]} or'
      f' [B, T] = {x.shape[:2]}.'
    )
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  if frequencies is None:
    frequencies = _frequencies(rotated // 2, base, dtype)
  angles = positions.astype(dtype)[..., None] * frequencies
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  if factor != 1:
    cos, sin = factor * cos, factor * sin
  if interleaved:
    pairs, rest = jnp.split(x, (rotated,), axis=-1)
    first, second = pairs[..., ::2], pairs[..., 1::2]
    pairs = [first * cos - second * sin, second * cos + first * sin]
    turned = jnp.stack(pairs, axis=-1).reshape(*x.shape[:-1], rotated)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
  first, second, rest = jnp.split(x, (rotated // 2, rotated), axis=-1)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate([y.astype(x.dtype) for y in turned] + [rest], axis=-1)


def sinusoidal(
  positions: Num[Array, '*P'], dim: int, *, max_period: float = 1e4
) -> Float[Array, '*P {dim}']:
  """[sin(p f_i), cos(p f_i)] with f_i = max_period^(-2i/dim), i < dim/2.

  Attention Is All You Need, https://arxiv.org/abs/1706.03762, with the sines
  first and the cosines after them instead of interleaved.
  """
  if dim < 2 or dim % 2:
    raise ConfigError(f'dim is {dim}; it must be even and at least 2.')
  dtype = jnp.promote_types(positions.dtype, jnp.float32)
  angles = positions.astype(dtype)[..., None] * _frequencies(
    dim // 2, max_period, dtype
  )
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def sincos_2d(
  height: int, width: int, dim: int, *, max_period: float = 1e4
) -> Float[Array, 'L {dim}']:
  """Fixed 2-D table for a grid of patches in row-major order, L = height width.

  Channels are [sin x, cos x, sin y, cos y], dim/4 each, with frequencies
  max_period^(-i / (dim/4 - 1)), i < dim/4: both ends included, as in Better
  plain ViT baselines, https://arxiv.org/abs/2205.01580. MoCo v3, where the
  table comes from (https://arxiv.org/abs/2104.02057), stops one step short.
  """
  if dim % 4 or dim < 8:
    raise ConfigError(f'dim is {dim}; it must be a multiple of 4, at least 8.')
  y, x = jnp.mgrid[:height, :width].astype(jnp.float32)
  steps = jnp.arange(dim // 4, dtype=jnp.float32) / (dim // 4 - 1)
  frequencies = max_period**-steps
  x, y = (p.reshape(-1, 1) * frequencies for p in (x, y))
  table = [jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)]
  return jnp.concatenate(table, axis=-1)
