"""Attention in tiles against dense attention, in seconds."""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import ops
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from experiments import page
from experiments.benchmarks.attention import close
from experiments.benchmarks.timing import interleaved
from experiments.survey.claim import (
  Claim,
  Statement,
  elsewhere,
  holds,
  listed,
  statement,
)

LENGTHS = (1024, 2048, 4096, 8192, 16_384)
TOKENS, HEADS, WIDTH = 16_384, 8, 64  # tokens of a batch, whatever the length
CALLS = 5  # in a turn of the clock
# What tiles its logits, as FlashAttention does.
TILED = ('blockwise', 'cudnn')


def contenders() -> dict:
  """Causal attention by name; on a GPU also cuDNN's."""

  def of(implementation):
    return functools.partial(
      ops.attention, mask=masks.Causal(), implementation=implementation
    )

  def keys_outside(q, k, v):
    return attention_blockwise(q, k, v, mask=masks.Causal(), order='key')[0]

  found = {
    'dense': of('reference'),
    'blockwise': of('blockwise'),
    'keys outside': keys_outside,
    'jax.nn': functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation='xla'
    ),
  }
  if jax.default_backend() == 'gpu':
    found['cudnn'] = functools.partial(
      jax.nn.dot_product_attention, is_causal=True, implementation='cudnn'
    )
  return found


def gradients(function):
  """Forward and backward pass of an attention."""
  return jax.grad(lambda *qkv: jnp.sum(function(*qkv) ** 2), (0, 1, 2))


def repeated(call) -> list:
  """The results of one turn of the clock."""
  return [call() for _ in range(CALLS)]


def measure(lengths=LENGTHS, tokens=TOKENS, rounds=9) -> dict:
  """R10: milliseconds by length and contender; a wrong one is not timed."""
  cpu = jax.default_backend() == 'cpu'
  dtype, tolerance = ('float32', 1e-4) if cpu else ('bfloat16', 5e-2)
  found = dict(lengths=list(lengths), names=list(contenders()))
  for length in lengths:
    shape = (max(1, tokens // length), length, HEADS, WIDTH)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(key, shape, dtype) for key in keys]
    for way in ('forward', 'training'):
      made = contenders()
      if way == 'training':
        made = {name: gradients(f) for name, f in made.items()}
      calls = {
        name: functools.partial(jax.jit(f), *qkv) for name, f in made.items()
      }
      if length == lengths[0]:
        wanted = jax.tree.leaves(calls['dense']())
        for name, call in calls.items():
          close(name, jax.tree.leaves(call()), wanted, tolerance)
      turns = {
        name: functools.partial(repeated, call) for name, call in calls.items()
      }
      for name, seconds in interleaved(turns, rounds).items():
        found.setdefault(f'{name} {way}', []).append(1e3 * seconds / CALLS)
  return found


def ratios(values, way: str) -> list[float]:
  """How many times faster the best tiled attention is, by length."""
  tiled = [values[f'{n} {way}'] for n in TILED if n in values['names']]
  best = [min(times) for times in zip(*tiled, strict=True)]
  return [
    dense / tile
    for dense, tile in zip(values[f'dense {way}'], best, strict=True)
  ]


def _faster(says, source, printed, way, low, high) -> Statement:
  @statement(
    says,
    source,
    printed,
    rule=f'{low:g} to {high:g} times at every length, {way}; restated if the '
    'two ranges overlap',
  )
  def times_are_in_the_range(v):
    found = ratios(v, way)
    least, most = min(found), max(found)
    verdict = holds(
      low <= least and most <= high, restated=least <= high and low <= most
    )
    return verdict, listed('{:.2f}x at {}', found, v['lengths'])

  return times_are_in_the_range


def _tables(values) -> list:
  return [
    part
    for way in ('forward', 'training')
    for part in (
      page.Table(
        ['tokens', *values['names']],
        [
          [n, *(values[f'{name} {way}'][i] for name in values['names'])]
          for i, n in enumerate(values['lengths'])
        ],
      ),
      page.Text(
        f'Milliseconds, {way}: causal, {HEADS} heads of {WIDTH}, {TOKENS:,} '
        'tokens a batch. `keys outside` is blockwise in the order of '
        'FlashAttention, the others go by queries as FlashAttention-2.',
        note=True,
      ),
    )
  ]


R10 = Claim(
  title='Attention in tiles is faster than dense attention',
  tier='c',
  measure=measure,
  parts=_tables,
  statements=(
    _faster(
      'FlashAttention is 2 to 4 times as fast as dense attention',
      'BLOG Class 1, Methods Comparison; S003 Flash Attention',
      '2-4x',
      'forward',
      2,
      4,
    ),
    _faster(
      'FlashAttention trains about 3 times as fast',
      'AS p. 14',
      '3x',
      'training',
      2.4,
      3.6,
    ),
    _faster(
      'FlashAttention-2 trains about 10 times as fast',
      'AS p. 14',
      '10x',
      'training',
      8,
      12,
    ),
    elsewhere(
      'FlashAttention-2 is twice as fast as FlashAttention',
      'BLOG Class 1, Methods Comparison',
      '2x',
      'needs both kernels; the table has both orders of the loops in XLA',
    ),
  ),
)

SPEED = {'R10': R10}
