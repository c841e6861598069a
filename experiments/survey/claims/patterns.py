"""Sparse patterns: pairs, and steps from any token to any other."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.models import cost
from efficient_attn.ops import masks
from efficient_attn.ops.routed.sinkhorn_attention import (
  sinkhorn,
  sinkhorn_attention,
)
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  Claim,
  Statement,
  holds,
  listed,
  statement,
  within,
)

LENGTHS = (64, 256, 1024, 2048)
WINDOW = 32
SORTED = (2**10, 2**14, 2**20)  # and four times as many tokens


def hops(pairs: np.ndarray) -> float:
  """The most steps between two tokens; infinite where there is no way."""
  reached, far = np.eye(len(pairs), dtype=bool), 0
  step = pairs | reached
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


def sorted_blocks(length: int, block=64, width=64) -> float:
  """FLOPs of Sinkhorn attention: 8 turns of dividing, mixtures, attention."""
  number = length // block
  x = jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32)
  logits = jax.ShapeDtypeStruct((1, 1, number, number), jnp.float32)

  def attend(q, k, v, logits):
    order = sinkhorn(logits, iterations=8)
    return sinkhorn_attention(q, k, v, order, block_size=block, causal=False)

  return cost.count(attend, x, x, x, logits).operations


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
  found['sinkhorn'] = {
    str(n): slope((n, 4 * n), [sorted_blocks(n), sorted_blocks(4 * n)])
    for n in SORTED
  }
  return found


def _exponent(name, says, printed, low, high) -> Statement:
  return within(says, 'FL p. 17-20', printed, f'{name} exponent', low, high)


@statement(
  'With a global token any two tokens are two steps apart',
  'FL p. 17-20',
  '2',
  rule='2 at every length',
)
def two_steps_through_a_global_token(v):
  hops = v['window and a global token hops']
  return holds(set(hops) == {2}), f'{hops}'


@statement(
  'A window needs O(sqrt n) layers to reach every token',
  'FL p. 20',
  'O(sqrt n)',
  rule='exponent of the steps below 0.6 at a window that does not grow',
)
def windows_need_the_root(v):
  lengths, hops = v['lengths'][:3], v['window hops']
  text = f'{hops} steps at {lengths} with {WINDOW} tokens'
  return holds(slope(lengths, hops) < 0.6), text


@statement(
  'Sinkhorn attention stays quadratic in the length',
  'FL p. 20',
  'O(n_b^2)',
  rule='exponent of the operations above 1.5 in blocks of 64; restated if only '
  'at the longest',
)
def sorting_is_quadratic(v):
  found = v['sinkhorn'].values()
  first, *_, last = found
  text = listed('n^{:.2f} from n = {:,} on', found, map(int, v['sinkhorn']))
  return holds(first > 1.5, restated=last > 1.5), text


def _table(values) -> list:
  head = [
    'pattern',
    'exponent of pairs',
    *(f'hops at {n}' for n in LENGTHS[:3]),
  ]
  rows = [
    [name, values[f'{name} exponent'], *values[f'{name} hops']]
    for name in patterns(64)
  ]
  return [page.Table(head, rows)]


R24 = Claim(
  title='Pairs and path lengths of sparse patterns',
  tier='a',
  measure=path_lengths,
  parts=_table,
  statements=(
    _exponent('window', 'A window has O(n) pairs', 'O(n)', 0.95, 1.08),
    _exponent(
      'strided', 'Strides have O(n sqrt n) pairs', 'O(n^1.5)', 1.4, 1.6
    ),
    _exponent(
      'log-sparse', 'LogSparse has O(n log n) pairs', 'O(n log n)', 1.02, 1.3
    ),
    two_steps_through_a_global_token,
    windows_need_the_root,
    sorting_is_quadratic,
  ),
)

PATTERNS = {'R24': R24}
