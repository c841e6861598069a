"""What sparse attention computes, reads and stores: counted on our ops."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.decode.eviction import Evicting
from efficient_attn.layers.mixers import build_mixer, mixer_options
from efficient_attn.models import cost
from efficient_attn.ops import attention, masks
from efficient_attn.ops.routed import nsa, vsa
from efficient_attn.ops.routed.hash_attention import hash_attention
from efficient_attn.ops.routed.moba import moba_attention
from efficient_attn.ops.selection import blocks, scoring, tokens, video
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.models import cache_bytes, mixer

TOKENS = 2**16  # in a cache


def _normal(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def whole_budget() -> dict[str, float]:
  """Largest differences from attention, of ops that may choose every key."""
  T, N, K, H = 96, 4, 2, 16
  q, k, v = _normal(0, (1, T, N, H), (1, T, K, H), (1, T, K, H))
  sizes, cubes = nsa.Sizes(8, 4, 16, 6, 16), vsa.cut((6, 4, 4), (2, 4, 2))

  def native(q, k, v):  # the other two branches have gates of zero
    gates = jnp.broadcast_to(jnp.array([0.0, 1.0, 0.0]), (1, T, N, 3))
    short = k[:, ::4], v[:, ::4]
    return nsa.nsa_attention(q, q, short, (k, v), (k, v), gates, sizes=sizes)

  def fine(q, k, v):
    gates = jnp.zeros(q.shape), jnp.ones(q.shape)
    return vsa.vsa_attention(q, k, v, *gates, cubes=cubes, top_k=6)

  def hashed(q, k, v):
    return hash_attention(q, k, v, jnp.sign(q), jnp.sign(k), top_k=T)[0]

  moba = functools.partial(moba_attention, block_size=16, top_k=6)
  ops = {'MoBA': moba, 'NSA, selected': native, 'HashAttention': hashed}
  found = {}
  for name, op in (ops | {'VSA, fine': fine}).items():
    wanted = oracles.softmax_attention(q[0], k[0], v[0], causal=op is not fine)
    found[name] = float(np.abs(jax.jit(op)(q, k, v)[0] - wanted).max())
  return found


def page_bounds(draws: int = 20) -> dict[str, int]:
  """Pages whose bound is below one of their products, of all."""
  wrong = total = 0
  for seed in range(draws):
    q, k = _normal(seed, (4, 16, 4, 16), (4, 128, 2, 16))
    bounds = tokens.page_bounds(q, k, 16)
    products = scoring.logits(q, k) * 4  # undoes the scale of the logits
    largest = products.reshape(*bounds.shape, 16).max(-1)
    # Rounding of sums of 16 products in float32.
    wrong += int((bounds < largest - 1e-5).sum())
    total += bounds.size
  return dict(wrong=wrong, total=total)


def antidiagonals() -> float:
  """Sums by one product of folded rows against sums pair by pair."""
  rng = np.random.default_rng(0)
  T, H, stride = 64, 16, 8
  q, k = rng.standard_normal((2, T, H))
  scores = q @ k.T / H**0.5
  wanted = np.zeros((T // stride, T // stride))
  for i, j, r in np.ndindex(*wanted.shape, stride):
    wanted[i, j] += scores[stride * i + r, stride * j + stride - 1 - r]
  with jax.enable_x64(True):
    q, k = (jnp.asarray(x)[None, :, None] for x in (q, k))
    found = np.asarray(blocks.antidiagonal_sums(q, k, stride))[0, 0]
  return float(np.abs(found - wanted).max())


def tiles_of_windows() -> dict[str, dict[str, int]]:
  """Blocks of a 24 x 24 grid in tiles of 4 x 4: windows of tokens, of tiles."""
  size, number = 16, 36
  near = np.asarray(masks.Neighborhood((24, 24), (12, 12)).dense(576, 576))
  order = np.argsort(video.tile_ids((1, 24, 24), (1, 4, 4)), kind='stable')
  tiled = np.asarray(masks.Neighborhood((6, 6), (3, 3), size).dense(576, 576))
  maps, kinds = {'tokens': near[..., order, :][..., order], 'tiles': tiled}, {}
  for name, pairs in maps.items():
    found = pairs.reshape(number, size, number, size).sum((1, 3))
    full = int((found == size**2).sum())
    kinds[name] = dict(full=full, mixed=int((found > 0).sum()) - full)
  return kinds


def tile_sparsity() -> float:
  """What a window of 3 x 3 x 3 tiles leaves out of a video of 5 x 6 x 10."""
  pairs = masks.Neighborhood((5, 6, 10), (3, 3, 3)).dense(300, 300)
  return 1 - float(pairs.mean())


def permuted_blocks() -> dict[str, float]:
  """Blocks in use where a head looks along one axis, as it is and permuted."""
  grid, size = (4, 16, 8), 16
  frame, _, column = np.unravel_index(np.arange(math.prod(grid)), grid)
  near = (frame[:, None] == frame) & (column[:, None] == column)
  p = jnp.asarray(near / near.sum(1), jnp.float32)[None, None]
  used = [
    float((video.block_sums(p, video.positions_in(grid, o), size) > 0).mean())
    for o in video.ORDERS
  ]
  return dict(before=used[0], after=min(used))


def radial() -> dict:
  """Pairs of Radial attention over F log F, and their growth with a frame."""

  def pairs(size, frames):
    mask = masks.Radial(size, frames)
    length = size * frames
    runs = mask.runs(np.arange(length)[:, None], length)
    starts, stops = (np.clip(x, 0, length) for x in runs)
    return int((stops - starts).sum())

  sizes = (32, 64, 128)
  return dict(
    ratios=[
      pairs(32, f) / (32**2 * f * math.log2(f)) for f in (16, 32, 64, 128)
    ],
    exponent=slope(sizes, [pairs(s, 16) for s in sizes]),
  )


def nsa_reads() -> dict[str, float]:
  """FLOPs of a token's attention to N others, over those of NSA.

  With the published sizes; FLOPs are in proportion to the keys that are read.
  """
  sizes, H = nsa.Sizes(32, 16, 64, 16, 512), 128
  found = {}

  def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  for length in (8192, 16_384, 32_768, 65_536):
    q = shaped(1, 1, 4, H)
    pairs = [
      (shaped(1, n, 1, H),) * 2 for n in (length // 16, length, sizes.window)
    ]
    sparse = functools.partial(
      nsa.nsa_attention, sizes=sizes, offset=length - 1, behind=511
    )
    dense = functools.partial(attention, implementation='reference')
    few = cost.flops(sparse, q, q, *pairs, shaped(1, 1, 4, 3))
    found[str(length)] = cost.flops(dense, q, *pairs[1]) / few
  return found


def moba_work() -> float:
  """FLOPs of causal attention over those of MoBA: 1M tokens, 12 blocks."""
  x = jax.ShapeDtypeStruct((1, 2**20, 1, 128), jnp.float32)
  moba = functools.partial(moba_attention, block_size=4096, top_k=12)
  dense = functools.partial(attention, implementation='reference')
  return cost.flops(dense, x, x, x) / 2 / cost.flops(moba, x, x, x)


@functools.cache
def with_one_kv_head(name: str, causal: bool = True) -> nnx.Module:
  """A row with one kv head, where it can have that."""
  options = {'num_kv_heads': 1} if 'num_kv_heads' in mixer_options(name) else {}
  return mixer(name, 512, 4, causal=causal, **options)


def cache_share(module: nnx.Module) -> float:
  """Bytes of a decode state at 64K tokens, as a share of attention's."""
  whole = cache_bytes(with_one_kv_head('attention'), TOKENS)
  return cache_bytes(module, TOKENS) / whole


def stored() -> dict[str, float]:
  """The share of sparse rows."""
  return {n: cache_share(with_one_kv_head(n)) for n in ('nsa', 'moba')}


def held_by_h2o(budget: int = 16) -> list[int]:
  """Tokens in the cache after a prompt of 64, and after each of 8 more."""

  def decode():
    plain = build_mixer('attention', d_model=32, num_heads=2, rngs=nnx.Rngs(0))
    layer = Evicting(plain, 'h2o', budget)
    cache, caches = layer.init_cache(1, 72, jnp.float32), []
    for length in (64,) + 8 * (1,):
      _, cache = layer(jnp.zeros((1, length, 32)), cache=cache)
      caches.append(cache)
    return caches

  return [cache['key'].shape[1] for cache in jax.eval_shape(decode)]
