"""Exact attention in tiles, and attention in few bits."""

import functools
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import ops
from efficient_attn.models import cost
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.sage_attention import Recipe, sage_attention
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.seeds import SEEDS, spread
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
  return functools.partial(
    ops.attention, mask=masks.Causal(), implementation=implementation
  )


def flash() -> dict:
  """R07: tiles against the definition, and the largest arrays."""
  found = dict(lengths=list(LENGTHS)) | exactness()
  for name in ('blockwise', 'reference'):
    sizes = [cost.largest_array(attend(name), *arrays(n)) for n in LENGTHS]
    found[f'{name} slope'] = slope(LENGTHS, sizes)
  return found


def exactness(length=2048) -> dict:
  """Errors of tiles, relative to the largest output of the definition."""
  found, plain = {}, arrays(length)
  wanted = oracles.softmax_attention(*(x[0] for x in plain), causal=True)
  for dtype in ('float32', 'bfloat16'):
    ours = attend('blockwise')(*(x.astype(dtype) for x in plain))
    found[f'error {dtype}'] = largest(ours[0], wanted)
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
      reason='float32 rounds sums of 2048 terms to 2048 x 6e-8 at the worst',
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

  def tiles(x):
    return jnp.moveaxis(x.reshape(1, -1, block, *x.shape[2:]), 1, 0)

  b, t, n, h = q.shape
  start = (
    jnp.full((b, n, t), -jnp.inf),
    jnp.zeros((b, n, t)),
    jnp.zeros((b, n, t, h)),
  )
  _, total, out = jax.lax.scan(step, start, (tiles(k), tiles(v)))[0]
  return (out / total[..., None]).swapaxes(1, 2)


def flash_backward() -> dict:
  """R08: the largest array of the gradient, with and without its own rule."""
  found = dict(lengths=list(LENGTHS))
  for name, function in (
    ('recomputed', attend('blockwise')),
    ('autodiff', _online),
  ):

    def loss(*arrays, attention=function):
      return attention(*arrays).sum()

    grad = jax.grad(loss, (0, 1, 2))
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
      provenance=DERIVED,
      unit='as exponent',
    ),
  ),
)


def wanted_of(qkv) -> np.ndarray:
  """Attention by definition, of arrays [1, T, N, H]."""
  return oracles.softmax_attention(*(x[0] for x in qkv))[None]


def a_bias(seed: int) -> jax.Array:
  """A vector that all keys share."""
  rng = np.random.default_rng(100 + seed)
  return jnp.asarray(rng.standard_normal((1, 1, 2, 64)), jnp.float32)


def invariance(seed: int) -> float:
  """How far attention to keys with a bias is from attention without."""
  q, k, v = arrays(256, seed=seed)
  return largest(
    ops.attention(q, k + 8 * a_bias(seed), v), wanted_of((q, k, v))
  )


# By name: the logits' format, and whether the mean of the keys is left out.
INTEGERS = {
  f'{form} {"smooth" if smooth else "raw"}': Recipe(
    logits=form, smooth_key=smooth, weights='float16', accumulator=(8, 23)
  )
  for form in ('int8', 'int4')
  for smooth in (False, True)
}
FP4 = {
  f'fp4 {"two levels" if two_level else "direct"}': Recipe(
    logits='e2m1',
    query_group=(1, 16),
    key_group=(1, 16),
    smooth_query=True,
    weights='e2m1',
    micro=16,
    two_level=two_level,
  )
  for two_level in (False, True)
}
BIASES = (0, 2, 8)


def rounded(recipe: Recipe, qkv) -> float:
  """The error of attention in few bits."""
  found = jax.jit(functools.partial(sage_attention, recipe=recipe))(*qkv)
  return mean_error(found, wanted_of(qkv))


def few_bits() -> dict:
  """R11: errors of the output in few bits, means over seeds, and for each."""
  found = {}
  for seed in SEEDS:
    q, k, v = arrays(256, seed=seed)
    row = dict(invariance=invariance(seed))
    for bias in BIASES:
      qkv = q, k + bias * a_bias(seed), v
      for name, recipe in INTEGERS.items():
        row[f'{name} {bias}'] = rounded(recipe, qkv)
    for name, recipe in FP4.items():
      row[name] = rounded(recipe, (q, k, v))
    for name, error in row.items():
      found.setdefault(name, []).append(error)
  means = {name: fmean(errors) for name, errors in found.items()}
  return means | dict(
    invariance=max(found['invariance']),
    smoothed=[
      raw / smooth
      for raw, smooth in zip(
        found['int8 raw 8'], found['int8 smooth 8'], strict=True
      )
    ],
    levels=[
      direct / two
      for direct, two in zip(
        found['fp4 direct'], found['fp4 two levels'], strict=True
      )
    ],
  )


@statement(
  'Leaving out the mean of the keys makes INT8 more exact',
  'AS p. 14',
  rule='less than half the error by every seed, where keys share a bias of 8 '
  'deviations',
)
def smoothing_halves_the_error(v):
  raw, smooth = (
    [v[f'int8 {kind} {bias}'] for bias in BIASES] for kind in ('raw', 'smooth')
  )
  text = listed('{:.3f} -> {:.3f} at bias {}', raw, smooth, BIASES)
  times = spread(v['smoothed'])
  return holds(min(v['smoothed']) > 2), f'{text}; at 8 {times} times less'


@statement(
  'Two levels of scales for P beat direct FP4',
  'AS p. 15',
  rule='a smaller error of the output by every seed; not well defined if by '
  'some',
)
def two_levels_win(v):
  text = (
    f'{v["fp4 direct"]:.3f} -> {v["fp4 two levels"]:.3f}, '
    f'{spread(v["levels"])} times less'
  )
  if min(v['levels']) > 1:
    return HOLDS, text
  return FAILS if max(v['levels']) < 1 else UNDEFINED, text


R11 = Claim(
  title='Attention in 8 and 4 bits: smoothing and two-level scales',
  tier='b',
  measure=few_bits,
  seeds=SEEDS,
  statements=(
    within(
      'A constant added to all keys does not change attention',
      'AS p. 14',
      'exact',
      'invariance',
      0,
      1e-5,
      reason='float32 rounds logits near 100 to 6e-6',
    ),
    smoothing_halves_the_error,
    two_levels_win,
  ),
)

HARDWARE = {'R07': R07, 'R08': R08, 'R11': R11}
