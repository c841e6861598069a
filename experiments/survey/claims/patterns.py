"""Sparse patterns: pairs, and steps from any token to any other."""

import math

import numpy as np

from efficient_attn.ops import masks
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
  within,
)

LENGTHS = (64, 256, 1024, 2048)
WINDOW = 32


def hops(pairs: np.ndarray) -> float:
  """The most steps between two tokens; infinite where there is no way."""
  reached, step, far = (
    np.eye(len(pairs), dtype=bool),
    pairs | np.eye(len(pairs), dtype=bool),
    0,
  )
  while not reached.all():
    further = (reached.astype(np.float32) @ step.astype(np.float32)) > 0
    if (further == reached).all():
      return math.inf
    reached, far = further, far + 1
  return far


def patterns(length: int) -> dict:
  """The patterns of the survey at a length that is a square."""
  root = math.isqrt(length)
  half = WINDOW // 2
  near = masks.Window(half, half)
  return {
    'window': near,
    'window of sqrt(n)': masks.Window(root // 2, root // 2),
    'strided': masks.Strided(root) | masks.Window(root, root),
    'log-sparse': masks.LogSparse(),
    'window and a global token': near | masks.Leading(1),
  }


def path_lengths() -> dict:
  """R24: pairs and path lengths of the patterns, both ways of each edge."""
  found = dict(lengths=list(LENGTHS))
  for length in LENGTHS:
    for name, mask in patterns(length).items():
      pairs = np.asarray(mask.dense(length, length))[0, 0]
      pairs = pairs | pairs.T
      found.setdefault(f'{name} pairs', []).append(int(pairs.sum()))
      if length <= 1024:
        found.setdefault(f'{name} hops', []).append(hops(pairs))
  for name in patterns(64):
    counts = found[f'{name} pairs']
    found[f'{name} exponent'] = slope(LENGTHS[1:], counts[1:])
  block = 64
  entries = {n: n * block + (n // block) ** 2 for n in (2**14, block**3, 2**24)}
  found['sinkhorn'] = {str(n): (n // block) ** 2 / (n * block) for n in entries}
  return found


def _exponent(name, says, printed, low, high) -> Statement:
  return within(says, 'FL p. 17-20', printed, f'{name} exponent', low, high)


R24 = Claim(
  title='Pairs and path lengths of sparse patterns',
  tier='a',
  measure=path_lengths,
  parts=lambda values: [
    page.Table(
      ['pattern', 'exponent of pairs', *(f'hops at {n}' for n in LENGTHS[:3])],
      [
        [name, values[f'{name} exponent'], *values[f'{name} hops']]
        for name in patterns(64)
      ],
    )
  ],
  statements=(
    _exponent('window', 'A window has O(n) pairs', 'O(n)', 0.95, 1.08),
    _exponent(
      'strided', 'Strides have O(n sqrt n) pairs', 'O(n^1.5)', 1.4, 1.6
    ),
    _exponent(
      'log-sparse', 'LogSparse has O(n log n) pairs', 'O(n log n)', 1.02, 1.3
    ),
    Statement(
      says='With a global token any two tokens are two steps apart',
      source='FL p. 17-20',
      printed='2',
      measured=lambda v: f'{v["window and a global token hops"]}',
      judge=lambda v: (
        HOLDS if set(v['window and a global token hops']) == {2} else FAILS
      ),
      rule='2 at every length',
    ),
    Statement(
      says='A window needs O(sqrt n) layers to reach every token',
      source='FL p. 20',
      printed='O(sqrt n)',
      measured=lambda v: (
        f'{v["window hops"]} steps at {v["lengths"][:3]} with {WINDOW} tokens'
      ),
      judge=lambda v: (
        HOLDS if slope(v['lengths'][:3], v['window hops']) < 0.6 else FAILS
      ),
      rule='exponent of the steps below 0.6 at a window that does not grow',
    ),
    Statement(
      says='Sinkhorn attention is quadratic in the number of blocks',
      source='FL p. 20',
      printed='O(n_b^2)',
      measured=lambda v: (
        'share of the sorting matrix: '
        + ', '.join(
          f'{x:.3g} at n = {int(n):,}' for n, x in v['sinkhorn'].items()
        )
      ),
      judge=lambda v: RESTATED if v['sinkhorn'][str(2**14)] < 0.1 else HOLDS,
      rule='the n_b^2 entries are below a tenth of those in blocks of 64 at '
      'n = 16,384: then the cost is linear in practice',
    ),
  ),
)

PATTERNS = {'R24': R24}
