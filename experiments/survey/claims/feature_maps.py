"""Feature maps of linear attention, by how near they come to softmax."""

import functools
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.models import cost
from efficient_attn.ops import linear_attention
from efficient_attn.ops.recurrent.feature_maps import (
  elu_plus_one,
  orthogonal_projection,
  positive_random,
  softmax_pair,
  taylor,
  taylor_diagonal,
)
from experiments import page
from experiments.errors import relative
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.claim import (
  Claim,
  Statement,
  equals,
  holds,
  statement,
  within,
)
from experiments.survey.seeds import SEEDS, spread

T, H = 256, 64
# Standard deviations of the scores q . k / sqrt(H).
SCALES = (0.125, 0.25, 0.5, 1, 2, 4)
FEATURES = (64, 256, 1024)
SQUARES, NO_SQUARES = 'QT-ViT (2d + 1)', 'QT-ViT without its squares'
EQUAL = 'equal weights'


@functools.cache
def _favor(seed, features):
  """FAVOR+ with w and -w, two features for each row."""
  projection = orthogonal_projection(jax.random.key(seed), features // 2, H)
  return jax.jit(
    functools.partial(positive_random, projection=projection, hyperbolic=True)
  )


def _diagonal(scores, squares, *, with_squares):
  """QT-ViT's map with the factors that fit exp best on these very pairs."""
  terms = np.stack([squares, scores, np.ones_like(scores)], -1).reshape(-1, 3)
  used = slice(0 if with_squares else 1, None)
  factors = np.zeros(3)
  factors[used], *_ = np.linalg.lstsq(
    terms[:, used], np.exp(scores).reshape(-1), rcond=None
  )
  # beta stands for a factor (4 / H)^(1/4) as well.
  factors = np.maximum(factors, 0) * (1, H**0.5 / 2, 1)
  alpha, beta, gamma = jnp.sqrt(jnp.float32(factors))
  return functools.partial(taylor_diagonal, alpha=alpha, beta=beta, gamma=gamma)


@jax.jit
def _taylor(x):
  return taylor(x)


@jax.jit
def _attend(queries, keys, v):
  return linear_attention(queries, keys, v, normalize=True, bidirectional=True)[
    0
  ]


def errors(seed: int, scale: float, features=FEATURES) -> dict[str, float]:
  """The error of the output of every map, relative to that of softmax."""
  rng = np.random.default_rng(seed)
  q, k, v = jnp.asarray(rng.standard_normal((3, 1, T, 1, H)), jnp.float32)
  q, k = (scale**0.5 * x for x in (q, k))
  exact = oracles.softmax_attention(q[0], k[0], v[0])[None]
  # Where the kernel is exp(x . y), the scale of the scores is in x and y.
  x, y = (z * H**-0.25 for z in (q, k))
  pairs = [np.asarray(z, np.float64)[0, :, 0] for z in (x, y)]
  scores = pairs[0] @ pairs[1].T
  squares = pairs[0] ** 2 @ (pairs[1] ** 2).T
  diagonal = functools.partial(_diagonal, scores, squares)
  maps = {
    'elu(x) + 1': (elu_plus_one, q, k),
    'relu': (jax.nn.relu, q, k),
    'softmax of [x, -x]': (softmax_pair, q, k),
    'Taylor, second order': (_taylor, x, y),
    SQUARES: (diagonal(with_squares=True), x, y),
    NO_SQUARES: (diagonal(with_squares=False), x, y),
    **{f'FAVOR+, {f} features': (_favor(seed, f), x, y) for f in features},
  }

  equal = jnp.broadcast_to(jnp.mean(v, 1, keepdims=True), exact.shape)
  found = {EQUAL: relative(equal, exact)}
  for name, (phi, queries, keys) in maps.items():
    found[name] = relative(_attend(phi(queries), phi(keys), v), exact)
  # Pairs of a query and a key whose squared score the self terms stand for.
  found['correlation'] = float(
    np.corrcoef(scores.reshape(-1) ** 2, squares.reshape(-1))[0, 1]
  )
  return found


def features() -> dict:
  """R23: errors over the scale of scores; features and FLOPs by width."""
  found, widths = dict(scales=list(SCALES)), (32, 64, 128)
  for scale in SCALES:
    for seed in SEEDS:
      for name, value in errors(seed, scale).items():
        by_scale = found.setdefault(name, {}).setdefault(str(scale), [])
        by_scale.append(value)
  one = jnp.ones(())
  compact = functools.partial(taylor_diagonal, alpha=one, beta=one, gamma=one)
  for name, phi in (('taylor', taylor), ('compact', compact)):
    flops, sizes = [], []
    for width in widths:
      x = jax.ShapeDtypeStruct((1, 1024, 1, width), jnp.float32)

      def attend(q, k, v, phi=phi):
        return linear_attention(phi(q), phi(k), v, normalize=True, chunk_size=8)

      flops.append(cost.flops(attend, x, x, x))
      sizes.append(jax.eval_shape(phi, x).shape[-1])
    found[f'{name} features'] = sizes[widths.index(H)]
    found[f'{name} growth'] = slope(widths, sizes)
    found[f'{name} exponent'] = slope(widths, flops)
  small = [
    fmean(found[f'FAVOR+, {f} features'][str(SCALES[0])]) for f in FEATURES
  ]
  found['random exponent'] = slope(FEATURES, small)
  return found


def _at(values, name, scale) -> float:
  return fmean(values[name][str(scale)])


def _near(says: str, source: str, name: str) -> Statement:
  """Whether a map stands for softmax at scores of some scale."""

  def measured(v):
    return ', '.join(
      f'{_at(v, name, s):.2g} at {s} (equal weights {_at(v, EQUAL, s):.2g})'
      for s in (0.125, 0.5, 1, 2)
    )

  def judge(v):
    small, equal = (_at(v, which, SCALES[0]) for which in (name, EQUAL))
    return holds(_at(v, name, 1) < 0.1, restated=small < 0.5 * equal)

  return Statement(
    says=says,
    source=source,
    measured=measured,
    judge=judge,
    rule='error of the output below 0.1 where scores have a standard deviation '
    'of 1; restated if half of that of equal weights, or less, at 0.125',
  )


@statement(
  'Squares of single channels say enough of the squared score',
  'AS p. 36',
  'sufficient',
  rule='correlation above 0.9, of normal queries and keys',
)
def squares_are_sufficient(v):
  found = v['correlation']['1']
  with_them, without, products = (
    _at(v, name, 0.5) for name in (SQUARES, NO_SQUARES, 'Taylor, second order')
  )
  text = (
    f'correlation {spread(found)}; error of the output at 0.5: '
    f'{with_them:.2g} with them, {without:.2g} without, {products:.2g} with '
    'all products'
  )
  return holds(fmean(found) > 0.9), text


def _plot(values) -> list:
  (made, axes), entries = page.figure(height=4.6), {}
  names = [n for n, v in values.items() if isinstance(v, dict)]
  names = [n for n in names if n not in (EQUAL, 'correlation', NO_SQUARES)]
  for i, name in enumerate([*names, EQUAL]):
    style = page.style(i)
    if name == EQUAL:
      style |= dict(color=page.INK, linestyle=':')
    elif 'FAVOR' in name:
      style |= dict(linestyle='--')
    heights = [_at(values, name, scale) for scale in SCALES]
    (entries[name],) = axes.loglog(SCALES, heights, **style)
  axes.set_xticks(SCALES, map(str, SCALES))
  axes.set_xticks([], minor=True)
  axes.set_xlabel('standard deviation of the scores')
  axes.set_ylabel('error of the output')
  page.legend(axes, entries)
  head = ['map', *(f'at {scale}' for scale in SCALES)]
  rows = [
    [name, *(spread(values[name][str(scale)]) for scale in SCALES)]
    for name in (*names, NO_SQUARES, EQUAL)
  ]
  caption = (
    f'Error against softmax attention, {T} normal queries and keys of {H} '
    f'channels, mean of {len(SEEDS)} seeds'
  )
  return [page.Plot(made, caption), page.Table(head, rows)]


R23 = Claim(
  title='Feature maps that stand for the softmax',
  tier='b',
  measure=features,
  seeds=SEEDS,
  parts=_plot,
  statements=(
    within(
      'Products of two channels make O(d^2) features',
      'AS p. 36',
      'd^2',
      'taylor growth',
      1.9,
      2.05,
    ),
    within(
      'With them linear attention costs O(N d^3)',
      'AS p. 36',
      'O(N d^3)',
      'taylor exponent',
      2.7,
      3.05,
    ),
    equals(
      'The compact map has 2 d + 1 features',
      'AS p. 36, eq. 67',
      '129',
      'compact features',
      2 * H + 1,
      tolerance=0,
    ),
    within(
      'With it linear attention costs O(N d^2)',
      'AS p. 36',
      'O(N d^2)',
      'compact exponent',
      1.7,
      2.05,
    ),
    squares_are_sufficient,
    _near(
      'A Taylor series of second order stands for the exponential',
      'AS p. 35-36, eq. 66',
      'Taylor, second order',
    ),
    _near('elu(x) + 1 stands for the exponential', 'FL p. 24-25', 'elu(x) + 1'),
    _near('ReLU stands for the exponential', 'AS p. 35', 'relu'),
    _near(
      'Positive random features stand for the exponential',
      'FL p. 25, eq. 35',
      f'FAVOR+, {FEATURES[-1]} features',
    ),
    within(
      'Their error falls with the root of their number',
      'FL p. 25',
      'O(p^-0.5)',
      'random exponent',
      -0.7,
      -0.4,
    ),
  ),
)

FEATURE_MAPS = {'R23': R23}
