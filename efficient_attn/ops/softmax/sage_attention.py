"""SageAttention 1, 2, 2++ and 3: the numerics of quantised attention.

    S = q^ k^T + mean(q) k'^T,   k' = k - mean_s k,   P = e^(S - max S)
    o = P^ v^ / sum P

with x^ the values of x in a low-precision format (`fake_quant`). Softmax does
not see the mean of the keys, nor does exact arithmetic see that of the queries
of a block, which comes back in high precision; what is left rounds better.

  sage1   8-bit integers per block of tokens; P and v in float16
          (https://arxiv.org/abs/2410.02367)
  sage2   4-bit integers; P and v in E4M3, added up in the 22 bits of the FP8
          tensor core for 64 keys and in float32 past them
          (https://arxiv.org/abs/2411.10958)
  sage2++ the same with a float16 accumulator, and so a narrower P and v
          (https://arxiv.org/abs/2505.21136)
  sage3   E2M1 with a scale in E4M3 for every 16 values, along channels for q
          and k and along keys for P and v. Each row of a tile of P is first
          stretched to [0, 448 * 6], so that its scales use the range of E4M3
          (https://arxiv.org/abs/2505.11594)

Two things differ from the kernels. The 4-bit scales of sage2 belong to the
tokens of one thread, 4 queries or 16 keys that interleave with others; here the
same number of neighbours share one. And P is relative to the final maximum of a
row, where a kernel has a running one. As in the kernels the mean of the keys is
that of all of them, so under a causal mask later tokens move the rounding (not
the exact value) of earlier rows. O(T S) time and memory: a reference for
accuracy, not for speed, and without gradients.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.fake_quant import FORMATS, fake_quant, round_to

BLOCK_Q, BLOCK_K = 128, 64  # the tile of the kernels
STEP = 32  # keys that one instruction of a tensor core adds up


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is rounded, and how.

  Attributes:
    logits: the format of queries and keys.
    query_group: tokens and channels (None: all) that share a scale.
    key_group: the same for keys.
    smooth_query: whether the mean of a block of queries is left out.
    smooth_key: whether the mean of the keys is.
    weights: the format of P and the values, 'float16' or of `fake_quant`.
    micro: values of P and v that share a scale, an E4M3; 0 for one scale in
      all of P, and one for each channel of v.
    limits: the largest P and v as integers of the format.
    two_level: whether micro-scaled P is stretched over the range of scales.
    accumulator: exponent and mantissa bits of sums within `flush` keys.
    flush: keys after which a sum is added to one in float32.
  """

  logits: str = 'int8'
  query_group: tuple[int, int | None] = (BLOCK_Q, None)
  key_group: tuple[int, int | None] = (BLOCK_K, None)
  smooth_query: bool = False
  smooth_key: bool = True
  weights: str = 'float16'
  micro: int = 0
  limits: tuple[float, float] = (448.0, 448.0)
  two_level: bool = True
  accumulator: tuple[int, int] = (8, 23)
  flush: int = BLOCK_K


_SAGE2 = Recipe(
  logits='int4',
  query_group=(4, None),
  key_group=(16, None),
  smooth_query=True,
  weights='e4m3',
  accumulator=(8, 13),
)
RECIPES = {
  'sage1': Recipe(accumulator=(5, 10)),
  'sage2': _SAGE2,
  'sage2++': dataclasses.replace(
    _SAGE2, limits=(224.0, 4.5), accumulator=(5, 10)
  ),
  'sage3': Recipe(
    logits='e2m1',
    query_group=(1, 16),
    key_group=(1, 16),
    smooth_query=True,
    weights='e2m1',
    micro=16,
  ),
}


def sage_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  recipe: str | Recipe = 'sage2',
  mask: masks.Mask | None = None,
  scale: float | None = None,
) -> Float[Array, 'B T N V']:
  """Attention as a low-precision kernel computes it.

  Args:
    query: queries.
    key: keys.
    value: values.
    recipe: a name in `RECIPES`, or one of your own.
    mask: an expression of `ops.masks`; None admits every pair. Means and
      scales cover what it hides, as in the kernels: no NaN may stand there.
    scale: factor of the logits, H**-0.5 by default.

  Returns:
    The output in the query's dtype; zeros for a row without keys.
  """
  if isinstance(recipe, str):
    if recipe not in RECIPES:
      raise ValueError(
        f'recipe = {recipe!r}: pass one of {", ".join(RECIPES)}, or a Recipe.'
      )
    recipe = RECIPES[recipe]
  (T, N, H), (S, K) = query.shape[1:], key.shape[1:3]
  if N % K:
    raise ValueError(
      f'N = {N} query heads cannot share K = {K} kv heads; N must be a multiple'
      ' of K.'
    )
  dtype = query.dtype
  q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
  s = sage_logits(q, k, recipe) * (H**-0.5 if scale is None else scale)
  if mask is not None:
    s = jnp.where(mask.dense(T, S), s, -jnp.inf)
  top = s.max(-1, keepdims=True)
  p = jnp.exp(s - jnp.where(top == -jnp.inf, 0, top))
  total = p.sum(-1)
  p, v, unit = round_weights(p, jnp.repeat(v, N // K, axis=2), recipe)
  out = accumulate(p, v, recipe).transpose(0, 2, 1, 3) * unit
  total = jnp.where(total == 0, 1, total).mT[..., None]
  return (out / total).astype(dtype)


def sage_logits(
  q: Float[Array, 'B T N H'], k: Float[Array, 'B S K H'], recipe: Recipe
) -> Float[Array, 'B N T S']:
  """q^ k^T + mean(q) k'^T, of rounded queries and keys."""
  G = q.shape[2] // k.shape[2]

  def product(q, k):
    return jnp.einsum('btnh,bsnh->bnts', q, jnp.repeat(k, G, axis=2))

  def rounded(x, group):
    tokens, channels = group
    scales = 'e4m3' if channels else None
    return fake_quant(
      x, recipe.logits, (1, tokens, 1, channels), scale_format=scales
    )

  if recipe.smooth_key:
    k = k - k.mean(1, keepdims=True)
  exact = 0.0
  if recipe.smooth_query:
    mean = block_mean(q, BLOCK_Q)
    q, exact = q - mean, product(mean, k)
  q, k_hat = rounded(q, recipe.query_group), rounded(k, recipe.key_group)
  return product(q, k_hat) + exact


def block_mean(
  x: Float[Array, 'B T N H'], size: int
) -> Float[Array, 'B T N H']:
  """The mean of every `size` tokens, at each of them."""
  B, T, N, H = x.shape
  pads = (0, 0), (0, -T % size), (0, 0), (0, 0)
  sums = jnp.pad(x, pads).reshape(B, -1, size, N, H).sum(2)
  counts = jnp.minimum(size, T - size * jnp.arange(sums.shape[1]))
  return jnp.repeat(sums / counts[:, None, None], size, axis=1)[:, :T]


def round_weights(
  p: Float[Array, 'B N T S'], v: Float[Array, 'B S N V'], recipe: Recipe
) -> tuple[
  Float[Array, 'B N T S'], Float[Array, 'B S N V'], Float[Array, '#B 1 #N #V']
]:
  """P^ and v^ as the tensor core reads them, and the unit of their product.

  P is at most 1.
  """
  form, one = recipe.weights, jnp.ones((1, 1, 1, 1), p.dtype)
  if form == 'float16':
    return *(x.astype(jnp.float16).astype(x.dtype) for x in (p, v)), one
  if not recipe.micro:
    limit_p, limit_v = recipe.limits
    unit = jnp.abs(v).max(1, keepdims=True) / limit_v  # of every channel
    unit = jnp.where(unit > 0, unit, 1)
    return round_to(p * limit_p, form), round_to(v / unit, form), unit / limit_p
  stretch = one
  if recipe.two_level:
    # The first level: the largest P of a row of a tile becomes 448 * 6.
    S = p.shape[-1]
    tile = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (0, -S % BLOCK_K)))
    tile = tile.reshape(*p.shape[:3], -1, BLOCK_K).max(-1)
    tile = jnp.where(tile == 0, 1, tile)
    full = FORMATS['e4m3'][1] * FORMATS[form][1]
    stretch = jnp.repeat(full / tile, BLOCK_K, axis=-1)[..., :S]
  groups = (1, 1, 1, recipe.micro), (1, recipe.micro, 1, 1)
  p, v = (
    fake_quant(x, form, group, scale_format='e4m3')
    for x, group in zip((p * stretch, v), groups, strict=True)
  )
  return p / stretch, v, one


def accumulate(
  p: Float[Array, 'B N T S'], v: Float[Array, 'B S N V'], recipe: Recipe
) -> Float[Array, 'B N T V']:
  """P v, with the sum of each `flush` keys in a narrow accumulator."""
  (B, N, T, S), V = p.shape, v.shape[-1]
  steps = -(-S // STEP)
  pad = steps * STEP - S
  p = jnp.pad(p, ((0, 0), (0, 0), (0, 0), (0, pad)))
  v = jnp.pad(v, ((0, 0), (0, pad), (0, 0), (0, 0)))
  p = jnp.moveaxis(p.reshape(B, N, T, steps, STEP), 3, 0)
  v = jnp.moveaxis(v.reshape(B, steps, STEP, N, V), 1, 0)

  def step(carry, inputs):
    total, narrow = carry
    p, v, last = inputs
    narrow = narrow + jnp.einsum('bnts,bsnv->bntv', p, v)
    narrow = lax.reduce_precision(narrow, *recipe.accumulator)
    total = jnp.where(last, total + narrow, total)
    return (total, jnp.where(last, 0, narrow)), None

  flushes = (jnp.arange(steps) + 1) * STEP % recipe.flush == 0
  zero = jnp.zeros((B, N, T, V), p.dtype)
  (total, narrow), _ = lax.scan(step, (zero, zero), (p, v, flushes))
  return total + narrow
