"""Layers that are computed again, and layers that can be run backwards."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import models
from efficient_attn.layers.stack import Stack
from efficient_attn.models import cost
from experiments import page
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  RESTATED,
  Claim,
  Statement,
  within,
)
from experiments.survey.recompute import (
  ahead,
  back,
  config,
  nothing,
  reversible,
  scanned,
  segments,
  stack,
)

TOKENS, WIDTH = 256, 256  # the width is that of `config`
DEPTHS = (16, 64, 100, 144, 400)
SHORT = (4, 8, 16)
ERRORS = (3, 12, 64, 256)
DTYPES = ('float32', 'bfloat16')
# By name in the values, what a method stores.
METHODS = {
  'all': 'all',
  'inputs': 'inputs of all layers',
  'segments': 'inputs of sqrt(l) segments',
  'reversible': 'the last outputs',
}


def training(function, periods) -> dict[str, float]:
  """Numbers that a training pass stores, and its FLOPs in forward passes.

  Memory is the peak of live arrays, less the gradients of the parameters, in
  inputs of a layer.
  """
  x = jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.float32)
  graphdef, params = nnx.split(periods)

  def loss(params, x):
    return jnp.sum(function(nnx.merge(graphdef, params), x))

  both = cost.count(jax.grad(loss, (0, 1)), params, x)
  memory = both.peak_bytes - cost.array_bytes(params)
  return dict(
    memory=memory / cost.array_bytes(x),
    passes=both.flops / cost.flops(loss, params, x),
  )


def in_segments(periods, count):
  """Abstract layers [l, ...] as segments [count, l / count, ...]."""
  return jax.tree.map(
    lambda p: jax.ShapeDtypeStruct(
      (count, p.shape[0] // count, *p.shape[1:]), p.dtype
    ),
    periods,
  )


def reversal(layers: int, dtype: str, width=64, tokens=32) -> float:
  """The largest error of the inputs computed back, over the largest input."""

  def errors(key):
    made = Stack(config(layers, width), causal=True, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (2, 1, tokens, width)).astype(dtype)
    pair, _ = jax.lax.scan(ahead, (x[0], x[1]), made.periods)
    found, _ = jax.lax.scan(back, pair, made.periods, reverse=True)
    wide = jnp.stack(found).astype(jnp.float32) - x.astype(jnp.float32)
    return jnp.abs(wide).max() / jnp.abs(x).max().astype(jnp.float32)

  return float(models.jit_init(errors)(jax.random.key(0)))


def wall(layers=24, tokens=1024, width=512) -> float:
  """Seconds of a training pass with `remat` over those without."""
  x = jax.random.normal(jax.random.key(0), (4, tokens, width))
  calls = {}
  for remat in ('none', 'full'):

    def loss(made, x):
      return jnp.sum(made(x)[0])

    options = config(layers, width, remat=remat)
    made = Stack(options, causal=True, rngs=nnx.Rngs(0))
    calls[remat] = functools.partial(jax.jit(jax.grad(loss)), made, x)
  seconds = interleaved(calls, 9)
  return seconds['full'] / seconds['none']


def measure() -> dict:
  """R32: what is stored and computed, by depth and by method."""
  found = dict(depths=list(DEPTHS), short=list(SHORT))

  def add(name, function, periods):
    for what, figure in training(function, periods).items():
      found.setdefault(f'{name} {what}', []).append(figure)

  for depth in DEPTHS:
    plain, again = (
      stack(depth, remat=remat).periods for remat in ('none', 'full')
    )
    parts = in_segments(plain, math.isqrt(depth))
    for name, function, periods in (
      ('all', scanned, plain),
      ('inputs', scanned, again),
      ('segments', segments, parts),
      ('reversible', reversible, plain),
    ):
      add(name, function, periods)
  for depth in SHORT:
    add('nothing', nothing, list(stack(depth, scan_layers=False).periods))
  for dtype in DTYPES:
    found[f'errors {dtype}'] = [reversal(depth, dtype) for depth in ERRORS]
  found['error of 12'] = found['errors float32'][ERRORS.index(12)]
  if jax.default_backend() != 'cpu':
    found['wall'] = wall()
  return found


def exponent(v, name: str) -> float:
  """Of memory in the depth."""
  depths = v['short'] if name == 'nothing' else v['depths']
  return slope(depths, v[f'{name} memory'])


def saved(v, name: str) -> list[float]:
  """How many times less memory, by depth."""
  both = zip(v['all memory'], v[f'{name} memory'], strict=True)
  return [a / b for a, b in both]


def _again(v) -> float:
  counts = zip(v['short'], v['nothing passes'], strict=True)
  return slope(
    v['short'], [depth * (n - v['all passes'][0]) for depth, n in counts]
  )


def _table(v) -> list:
  rows = [
    [
      depth,
      *(
        cell
        for name in METHODS
        for cell in (v[f'{name} memory'][i], v[f'{name} passes'][i])
      ),
    ]
    for i, depth in enumerate(v['depths'])
  ]
  head = ['layers']
  for said in METHODS.values():
    head += [said, 'passes']
  return [
    page.Table(head, rows),
    page.Text(
      'Peak of live arrays in inputs of a layer, without the gradients of the '
      f'parameters, and FLOPs in forward passes: blocks of width {WIDTH} on '
      f'{TOKENS} tokens.',
      note=True,
    ),
    page.Table(
      ['layers', *(f'reversible, error in {d}' for d in DTYPES)],
      [
        [depth, *(v[f'errors {dtype}'][i] for dtype in DTYPES)]
        for i, depth in enumerate(ERRORS)
      ],
    ),
  ]


R32 = Claim(
  title='Layers that are computed again, and reversible ones',
  tier='b',
  measure=measure,
  seeds=(0,),
  parts=_table,
  statements=(
    Statement(
      says='With the inputs of sqrt(l) segments memory is O(sqrt l)',
      source='FL p. 9',
      printed='O(sqrt l)',
      measured=lambda v: (
        f'l^{exponent(v, "segments"):.2f}; l^{exponent(v, "all"):.2f} where '
        'everything is stored'
      ),
      judge=lambda v: HOLDS if 0.4 < exponent(v, 'segments') < 0.6 else FAILS,
      rule='exponent between 0.4 and 0.6, 16 to 400 layers',
    ),
    Statement(
      says='It costs one more forward pass',
      source='FL p. 9',
      printed='1',
      measured=lambda v: (
        f'{v["segments passes"][-1] - v["all passes"][-1]:.2f}'
      ),
      judge=lambda v: (
        HOLDS
        if abs(v['segments passes'][-1] - v['all passes'][-1] - 1) < 0.05
        else FAILS
      ),
      rule='within 5 percent, in FLOPs of the products',
    ),
    Statement(
      says='Models may be ten times as large',
      source='FL p. 9',
      printed='10x',
      measured=lambda v: '; '.join(
        f'{said} '
        + ', '.join(
          f'{x:.1f}x at {depth}'
          for x, depth in zip(saved(v, name), v['depths'], strict=True)
        )
        for name, said in (
          ('segments', 'sqrt(l) segments'),
          ('inputs', 'inputs of all layers'),
        )
      ),
      judge=lambda v: (
        HOLDS
        if saved(v, 'segments')[1] > 10
        else RESTATED
        if saved(v, 'inputs')[1] > 10
        else FAILS
      ),
      rule='a tenth of the memory at 64 layers with sqrt(l) segments; restated '
      'if only with the inputs of all layers, which is O(l)',
    ),
    Statement(
      says='Checkpoints take 1.2 times the computation',
      source='FLR gradient_checkpointing.svg',
      printed='1.2x',
      measured=lambda v: ', '.join(
        f'{v[f"{name} passes"][-1] / v["all passes"][-1]:.2f}x {said}'
        for name, said in (
          ('segments', 'in segments'),
          ('inputs', 'layer by layer'),
        )
      ),
      judge=lambda v: (
        HOLDS
        if any(
          abs(v[f'{name} passes'][-1] / v['all passes'][-1] / 1.2 - 1) < 0.05
          for name in ('segments', 'inputs')
        )
        else FAILS
      ),
      rule='FLOPs of a training pass, either way, within 5 percent',
    ),
    Statement(
      says='Training takes 20 percent longer',
      source='FL p. 9',
      printed='20%',
      measured=lambda v: f'{v["wall"] - 1:.0%}' if 'wall' in v else '',
      judge=lambda v: (
        NOT_HERE
        if 'wall' not in v
        else HOLDS
        if abs(v['wall'] - 1.2) < 0.06
        else FAILS
      ),
      rule='14 to 26 percent on an accelerator, 24 layers',
    ),
    Statement(
      says='With nothing stored memory is O(1) and computation O(l^2)',
      source='FL p. 9',
      printed='O(1), O(l^2)',
      measured=lambda v: (
        f'memory l^{exponent(v, "nothing"):.2f}, computed again '
        f'l^{_again(v):.2f}'
      ),
      judge=lambda v: (
        HOLDS if exponent(v, 'nothing') < 0.1 and _again(v) > 1.8 else FAILS
      ),
      rule='exponents below 0.1, and above 1.8 for what is computed again, '
      '4 to 16 layers',
    ),
    within(
      'Inputs of reversible layers follow from their outputs',
      'FL p. 9',
      'exact',
      'error of 12',
      0,
      1e-5,
      unit='in float32, 12 layers',
    ),
    Statement(
      says='The errors of rounding accumulate',
      source='FL p. 9',
      printed='',
      measured=lambda v: (
        '; '.join(
          f'{dtype} ' + ', '.join(f'{x:.1e}' for x in v[f'errors {dtype}'])
          for dtype in DTYPES
        )
        + f' at {ERRORS} layers'
      ),
      judge=lambda v: (
        HOLDS
        if all(
          v[f'errors {dtype}'][-1] > 3 * v[f'errors {dtype}'][0]
          for dtype in DTYPES
        )
        else FAILS
      ),
      rule='at the most layers three times the error at the fewest, or more',
    ),
    Statement(
      says='Reversible layers need memory that does not depend on the depth',
      source='FL p. 9',
      printed='O(1)',
      measured=lambda v: f'l^{exponent(v, "reversible"):.2f}',
      judge=lambda v: HOLDS if exponent(v, 'reversible') < 0.1 else FAILS,
      rule='exponent below 0.1, without the gradients of the parameters',
    ),
    Statement(
      says='Reversible layers take 2 times the computation',
      source='FLR gradient_checkpointing.svg',
      printed='2x',
      measured=lambda v: (
        f'{v["reversible passes"][-1] / v["all passes"][-1]:.2f}x'
      ),
      judge=lambda v: (
        HOLDS
        if abs(v['reversible passes'][-1] / v['all passes'][-1] / 2 - 1) < 0.1
        else FAILS
      ),
      rule='FLOPs of a training pass, within 10 percent',
    ),
  ),
)

MEMORY_TRICKS = {'R32': R32}
