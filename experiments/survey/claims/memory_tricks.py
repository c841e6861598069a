"""Layers that are computed again, and layers that can be run backwards."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import models
from efficient_attn.layers import reversible as pairs
from efficient_attn.layers.stack import Stack
from efficient_attn.models import cost
from experiments import page
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope
from experiments.survey.claim import (
  NOT_HERE,
  Claim,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.recompute import (
  config,
  feed,
  mix,
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

  def cut(p):
    shape = (count, p.shape[0] // count, *p.shape[1:])
    return jax.ShapeDtypeStruct(shape, p.dtype)

  return jax.tree.map(cut, periods)


def reversal(layers: int, dtype: str, width=64, tokens=32) -> float:
  """The largest error of the inputs computed back, over the largest input."""

  def errors(key):
    made = Stack(config(layers, width), causal=True, rngs=nnx.Rngs(key))
    x = jax.random.normal(key, (2, 1, tokens, width)).astype(dtype)
    pair = pairs.reversible(mix, feed, made.periods, (x[0], x[1]))
    found = pairs.invert(mix, feed, made.periods, pair)
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


def passes(v, name: str) -> tuple[float, float]:
  """Forward passes of the deepest stack, and those where all is stored."""
  return v[f'{name} passes'][-1], v['all passes'][-1]


@statement(
  'With the inputs of sqrt(l) segments memory is O(sqrt l)',
  'FL p. 9',
  'O(sqrt l)',
  rule='exponent between 0.4 and 0.6, 16 to 400 layers',
)
def segments_need_the_root(v):
  found, everything = exponent(v, 'segments'), exponent(v, 'all')
  text = f'l^{found:.2f}; l^{everything:.2f} where everything is stored'
  return holds(0.4 < found < 0.6), text


@statement(
  'It costs one more forward pass',
  'FL p. 9',
  '1',
  rule='within 5 percent, in FLOPs of the products',
)
def segments_add_a_pass(v):
  found, everything = passes(v, 'segments')
  verdict = holds(abs(found - everything - 1) < 0.05)
  return verdict, f'{found - everything:.2f}'


@statement(
  'Models may be ten times as large',
  'FL p. 9',
  '10x',
  rule='a tenth of the memory at 64 layers with sqrt(l) segments; restated if '
  'only with the inputs of all layers, which is O(l)',
)
def a_tenth_at_64_layers(v):
  roots, inputs = saved(v, 'segments'), saved(v, 'inputs')
  of_roots, of_inputs = (
    listed('{:.1f}x at {}', times, v['depths']) for times in (roots, inputs)
  )
  text = f'sqrt(l) segments {of_roots}; inputs of all layers {of_inputs}'
  return holds(roots[1] > 10, restated=inputs[1] > 10), text


@statement(
  'Checkpoints take 1.2 times the computation',
  'FLR gradient_checkpointing.svg',
  '1.2x',
  rule='FLOPs of a training pass, either way, within 5 percent',
)
def checkpoints_take_a_fifth(v):
  found, everything = passes(v, 'segments')
  ratios = found / everything, passes(v, 'inputs')[0] / everything
  text = '{:.2f}x in segments, {:.2f}x layer by layer'.format(*ratios)
  return holds(any(abs(x / 1.2 - 1) < 0.05 for x in ratios)), text


@statement(
  'Training takes 20 percent longer',
  'FL p. 9',
  '20%',
  rule='14 to 26 percent on an accelerator, 24 layers',
)
def a_fifth_longer(v):
  if 'wall' not in v:
    return NOT_HERE, ''
  return holds(abs(v['wall'] - 1.2) < 0.06), f'{v["wall"] - 1:.0%}'


@statement(
  'With nothing stored memory is O(1) and computation O(l^2)',
  'FL p. 9',
  'O(1), O(l^2)',
  rule='exponents below 0.1, and above 1.8 for what is computed again, 4 to 16 '
  'layers',
)
def nothing_stored_is_quadratic(v):
  counts = zip(v['short'], v['nothing passes'], strict=True)
  more = [depth * (n - v['all passes'][0]) for depth, n in counts]
  memory, again = exponent(v, 'nothing'), slope(v['short'], more)
  text = f'memory l^{memory:.2f}, computed again l^{again:.2f}'
  return holds(memory < 0.1 and again > 1.8), text


@statement(
  'The errors of rounding accumulate',
  'FL p. 9',
  rule='at the most layers three times the error at the fewest, or more',
)
def errors_grow(v):
  errors = {dtype: v[f'errors {dtype}'] for dtype in DTYPES}
  rows = [listed('{:.1e}', row) for row in errors.values()]
  text = f'{listed("{} {}", errors, rows, by="; ")} at {ERRORS} layers'
  return holds(all(row[-1] > 3 * row[0] for row in errors.values())), text


@statement(
  'Reversible layers need memory that does not depend on the depth',
  'FL p. 9',
  'O(1)',
  rule='exponent below 0.1, without the gradients of the parameters',
)
def reversible_memory_is_constant(v):
  found = exponent(v, 'reversible')
  return holds(found < 0.1), f'l^{found:.2f}'


@statement(
  'Reversible layers take 2 times the computation',
  'FLR gradient_checkpointing.svg',
  '2x',
  rule='FLOPs of a training pass, within 10 percent',
)
def reversible_layers_take_two(v):
  found, everything = passes(v, 'reversible')
  ratio = found / everything
  return holds(abs(ratio / 2 - 1) < 0.1), f'{ratio:.2f}x'


def _table(v) -> list:
  head, columns = ['layers'], [v['depths']]
  for name, said in METHODS.items():
    head += [said, 'passes']
    columns += [v[f'{name} memory'], v[f'{name} passes']]
  errors = [f'errors {dtype}' for dtype in DTYPES]
  return [
    page.Table(head, list(zip(*columns, strict=True))),
    page.Text(
      'Peak of live arrays in inputs of a layer, without the gradients of the '
      f'parameters, and FLOPs in forward passes: blocks of width {WIDTH} on '
      f'{TOKENS} tokens.',
      note=True,
    ),
    page.Table(
      ['layers', *(f'reversible, error in {d}' for d in DTYPES)],
      list(zip(ERRORS, *(v[key] for key in errors), strict=True)),
    ),
  ]


R32 = Claim(
  title='Layers that are computed again, and reversible ones',
  tier='b',
  measure=measure,
  seeds=(0,),
  parts=_table,
  statements=(
    segments_need_the_root,
    segments_add_a_pass,
    a_tenth_at_64_layers,
    checkpoints_take_a_fifth,
    a_fifth_longer,
    nothing_stored_is_quadratic,
    within(
      'Inputs of reversible layers follow from their outputs',
      'FL p. 9',
      'exact',
      'error of 12',
      0,
      1e-5,
      unit='in float32, 12 layers',
    ),
    errors_grow,
    reversible_memory_is_constant,
    reversible_layers_take_two,
  ),
)

MEMORY_TRICKS = {'R32': R32}
