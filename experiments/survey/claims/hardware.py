"""Exact attention in tiles, pieces and pages, and attention in few bits."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import ops
from efficient_attn.models import cost
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention_merge import split_attention
from efficient_attn.ops.softmax.paged_attention import paged_attention
from efficient_attn.ops.softmax.sage_attention import Recipe, sage_attention
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
  within,
)
from experiments.survey.sources import OURS

# Longer than what a tile holds, which does not grow.
LENGTHS = (8192, 16_384, 32_768, 65_536)


def arrays(length, heads=2, width=64, seed=0, dtype=jnp.float32):
  """Normal queries, keys and values [1, length, heads, width]."""
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.standard_normal((1, length, heads, width)), dtype)
    for _ in range(3)
  )


def mean_error(found, wanted) -> float:
  """The mean absolute difference over the mean absolute number."""
  return float(np.abs(found - wanted).sum() / np.abs(wanted).sum())


def attend(implementation):
  """Causal attention of one implementation."""
  return lambda q, k, v: ops.attention(
    q, k, v, mask=masks.Causal(), implementation=implementation
  )


def flash() -> dict:
  """R07: tiles against the dense definition, and the largest arrays."""
  found = dict(lengths=list(LENGTHS))
  for name, dtype in (('float32', jnp.float32), ('bfloat16', jnp.bfloat16)):
    wanted = attend('reference')(*arrays(2048))
    ours = attend('blockwise')(*arrays(2048, dtype=dtype))
    found[f'error {name}'] = largest(ours, wanted)
  for name in ('blockwise', 'reference'):
    sizes = [cost.largest_array(attend(name), *arrays(n)) for n in LENGTHS]
    found[f'{name} slope'] = slope(LENGTHS, sizes)
  return found


R07 = Claim(
  title='Attention in tiles is exact and needs memory O(N)',
  tier='b',
  measure=flash,
  seeds=(0,),
  statements=(
    within(
      'Tiles give what dense attention gives',
      'AS p. 6',
      'exact',
      'error float32',
      0,
      1e-5,
    ),
    within(
      'The forward pass needs memory O(N)',
      'S001 Complexity Comparison; S003 Flash Attention',
      'O(n)',
      'blockwise slope',
      0.9,
      1.1,
      unit='as exponent',
    ),
    within(
      'Dense attention needs memory O(N^2)',
      'AS p. 6',
      'O(N^2)',
      'reference slope',
      1.9,
      2.1,
      unit='as exponent',
    ),
  ),
)


def _online(q, k, v, block=128):
  """Online softmax as a scan over blocks of keys, without a backward rule."""

  def step(carry, tile):
    top, total, out = carry
    keys, values = tile
    logits = jnp.einsum('bqnh,bknh->bnqk', q, keys) * q.shape[-1] ** -0.5
    new = jnp.maximum(top, logits.max(-1))
    weights, fade = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
    out = out * fade[..., None] + jnp.einsum('bnqk,bknh->bnqh', weights, values)
    return (new, total * fade + weights.sum(-1), out), None

  tiles = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(1, -1, block, *x.shape[2:]), 1, 0), (k, v)
  )
  b, t, n, h = q.shape
  start = (
    jnp.full((b, n, t), -jnp.inf),
    jnp.zeros((b, n, t)),
    jnp.zeros((b, n, t, h)),
  )
  _, total, out = jax.lax.scan(step, start, tiles)[0]
  return (out / total[..., None]).swapaxes(1, 2)


def flash_backward() -> dict:
  """R08: the largest array of the gradient, with and without its own rule."""
  found = dict(lengths=list(LENGTHS))
  for name, function in (
    ('recomputed', attend('blockwise')),
    ('autodiff', _online),
  ):
    grad = jax.grad(lambda *x, f=function: f(*x).sum(), (0, 1, 2))
    sizes = [cost.largest_array(grad, *arrays(n)) for n in LENGTHS]
    found[f'{name} slope'] = slope(LENGTHS, sizes)
  return found


R08 = Claim(
  title='The backward pass in tiles computes again instead of storing',
  tier='b',
  measure=flash_backward,
  seeds=(0,),
  statements=(
    within(
      'With recomputation the gradient needs memory O(N)',
      'AS p. 14',
      'O(N)',
      'recomputed slope',
      0.9,
      1.1,
      unit='as exponent',
    ),
    within(
      'Differentiating the tiled loop as it is needs memory O(N)',
      f'{OURS}, on S003 Flash Attention',
      '',
      'autodiff slope',
      0.9,
      1.1,
      unit='as exponent',
    ),
  ),
)


def few_bits() -> dict:
  """R11: outputs of low-precision attention, with and without smoothing."""
  found = {}
  q, k, v = arrays(256)
  rng = np.random.default_rng(1)
  bias = jnp.asarray(rng.standard_normal((1, 1, 2, 64)), jnp.float32)
  plain = ops.attention(q, k + 8 * bias, v)
  found['invariance'] = largest(ops.attention(q, k, v), plain)
  for strength in (0, 2, 8):
    keys = k + strength * bias
    wanted = ops.attention(q, keys, v)
    for form in ('int8', 'int4'):
      for smooth in (False, True):
        recipe = Recipe(
          logits=form, smooth_key=smooth, weights='float16', accumulator=(8, 23)
        )
        ours = sage_attention(q, keys, v, recipe=recipe)
        name = f'{form} {"smooth" if smooth else "raw"} {strength}'
        found[name] = mean_error(ours, wanted)
  for two_level in (False, True):
    recipe = Recipe(
      logits='e2m1',
      query_group=(1, 16),
      key_group=(1, 16),
      smooth_query=True,
      weights='e2m1',
      micro=16,
      two_level=two_level,
    )
    ours = sage_attention(q, k, v, recipe=recipe)
    wanted = ops.attention(q, k, v)
    found[f'fp4 {"two levels" if two_level else "direct"}'] = mean_error(
      ours, wanted
    )
  return found


R11 = Claim(
  title='Attention in 8 and 4 bits: smoothing and two-level scales',
  tier='b',
  measure=few_bits,
  seeds=(0, 1),
  statements=(
    within(
      'A constant added to all keys does not change attention',
      'AS p. 14',
      'exact',
      'invariance',
      0,
      1e-5,
    ),
    Statement(
      says='Leaving out the mean of the keys makes INT8 more exact',
      source='AS p. 14',
      printed='',
      measured=lambda v: ', '.join(
        f'{v[f"int8 raw {s}"]:.3f} -> {v[f"int8 smooth {s}"]:.3f} at bias {s}'
        for s in (0, 2, 8)
      ),
      judge=lambda v: (
        HOLDS if v['int8 smooth 8'] < 0.5 * v['int8 raw 8'] else FAILS
      ),
      rule='half the error or less where keys share a bias of 8 deviations',
    ),
    Statement(
      says='Two levels of scales for P beat direct FP4',
      source='AS p. 15, table 2',
      printed='',
      measured=lambda v: f'{v["fp4 direct"]:.3f} -> {v["fp4 two levels"]:.3f}',
      judge=lambda v: HOLDS if v['fp4 two levels'] < v['fp4 direct'] else FAILS,
      rule='a smaller relative error of the output',
    ),
  ),
)


def pieces() -> dict:
  """R13: attention to pieces of the keys, merged, against the whole."""
  q, k, v = arrays(4096)
  q = q[:, -1:]
  wanted = ops.attention(q, k, v, implementation='reference')
  worst = max(
    largest(split_attention(q, k, v, num_splits=n)[0], wanted)
    for n in (1, 2, 3, 7, 16, 33, 64)
  )
  return dict(error=worst)


R13 = Claim(
  title='Decoding in pieces merges exactly',
  tier='b',
  measure=pieces,
  seeds=(0,),
  statements=(
    within(
      'Pieces of the keys attended apart merge exactly',
      'AS p. 15',
      'exact',
      'error',
      0,
      2e-6,
    ),
  ),
)

PAGE, REQUESTS, LONGEST = 16, 200, 2048


def pages() -> dict:
  """R14: paged against contiguous, and slots wasted on a trace of requests."""
  rng = np.random.default_rng(3)
  q, k, v = arrays(64)
  order = rng.permutation(4)
  pools = [
    jnp.zeros((4, PAGE, *x.shape[2:]))
    .at[order]
    .set(x.reshape(4, PAGE, *x.shape[2:]))
    for x in (k, v)
  ]
  ours = paged_attention(
    q[:, -1:], *pools, jnp.asarray(order)[None], jnp.array([64])
  )
  wanted = ops.attention(q[:, -1:], k, v)
  lengths = np.minimum(
    rng.lognormal(5.5, 1.0, REQUESTS).astype(int) + 1, LONGEST
  )
  reserved = -(-lengths // PAGE) * PAGE
  return dict(
    error=largest(ours, wanted),
    waste_per_request=float((reserved - lengths).mean()),
    waste=float(1 - lengths.sum() / reserved.sum()),
    waste_reserved=float(1 - lengths.sum() / (LONGEST * REQUESTS)),
  )


R14 = Claim(
  title='Pages waste almost no memory',
  tier='b',
  measure=pages,
  seeds=(0, 3),
  statements=(
    within(
      'Paged attention gives what contiguous attention gives',
      'AS p. 15',
      'exact',
      'error',
      0,
      2e-6,
    ),
    within(
      'Waste is near zero',
      'AS p. 15',
      'near zero',
      'waste',
      0,
      0.05,
      unit='of the slots',
      provenance=DERIVED,
      otherwise=RESTATED,
    ),
    within(
      'Less than half a page of each sequence is wasted on average',
      f'{OURS}, on AS p. 15',
      '',
      'waste_per_request',
      0,
      PAGE / 2 + 0.5,
      unit='slots',
      provenance=DERIVED,
    ),
  ),
)

HARDWARE = {
  'R07': R07,
  'R08': R08,
  'R11': R11,
  'R13': R13,
  'R14': R14,
}
