"""Reformer: what hashing costs, and which keys it finds."""

import math
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.models import cost
from efficient_attn.ops.routed.lsh_attention import lsh_attention, lsh_buckets
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  Claim,
  Statement,
  holds,
  less,
  listed,
  statement,
  within,
)
from experiments.survey.seeds import SEEDS, spread
from experiments.survey.sources import OURS

H, CHUNK = 64, 64
LENGTHS = (2**10, 2**12, 2**14, 2**16)
ANGLES = (0, 15, 30, 45, 60, 75, 90)
ROUNDS = (1, 2, 4, 8)
T, TOP = 1024, 16


def factors(length: int, number: int) -> list[int]:
  """2 N / 64 buckets, as advised, as one factor or as a product of two."""
  buckets = 2 * length // CHUNK
  first = 2 ** (round(math.log2(buckets)) // 2)
  return [buckets] if number == 1 else [first, buckets // first]


def costs() -> dict:
  """FLOPs of hashing, and of what follows it, by length."""
  found = {}
  for length in LENGTHS:
    x = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
    for number, name in ((1, 'hashing'), (2, 'hashing by two factors')):
      shapes = [(1, 1, H, factor // 2) for factor in factors(length, number)]
      rotations = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
      count = cost.count(lsh_buckets, x, rotations)
      found.setdefault(name, []).append(count.operations)
    ids = jax.ShapeDtypeStruct((1, length, 1, 1), jnp.int32)

    def attend(q, k, v, ids, length=length):
      number = 2 * length // CHUNK
      return lsh_attention(
        q, k, v, ids, num_buckets=number, chunk_size=CHUNK, causal=False
      )

    count = cost.count(attend, x, x, x, ids)
    found.setdefault('sorting and attention', []).append(count.operations)
  return {
    name: dict(cost=c, exponent=slope(LENGTHS, c)) for name, c in found.items()
  }


def collisions(buckets: int) -> list[float]:
  """How often two vectors at each of ANGLES share a bucket."""
  rng = np.random.default_rng(0)
  draws = 4000
  rotations = [jnp.asarray(rng.standard_normal((1, draws, H, buckets // 2)))]
  first, second = np.eye(H)[:2]
  angles = np.radians(ANGLES)[:, None]
  x = np.cos(angles) * first + np.sin(angles) * second
  x = jnp.asarray(x[None, :, None], jnp.float32)
  ids = np.asarray(lsh_buckets(x, rotations))[0, :, 0]
  return [float(share) for share in (ids == ids[0]).mean(1)]


def vectors(kind: str, seed: int) -> np.ndarray:
  """Queries that are their own keys, [T, H]: independent, or 64 clusters."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((T, H))
  if kind == 'clusters':
    centres = rng.standard_normal((64, H))
    x = centres[rng.integers(0, 64, T)] + 0.7 * x
  return x


@jax.jit
def _hash(x, rotations):
  return lsh_buckets(x, rotations)


def recall(kind: str) -> dict:
  """The share of the TOP largest weights of a token in its bucket."""
  found = {}
  for seed in SEEDS:
    x = vectors(kind, seed)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    scores = x @ unit.T
    np.fill_diagonal(scores, -np.inf)
    best = np.argsort(-scores, 1)[:, :TOP]
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    rng = np.random.default_rng(seed + 100)
    shape = (1, max(ROUNDS), H, T // CHUNK)
    rotations = [jnp.asarray(rng.standard_normal(shape), jnp.float32)]
    ids = np.asarray(
      _hash(jnp.asarray(x[None, :, None], jnp.float32), rotations)
    )[0, :, 0]
    same = ids[:, None] == ids
    for rounds in ROUNDS:
      seen = same[..., :rounds].any(-1)
      np.fill_diagonal(seen, False)
      row = found.setdefault(str(rounds), dict(recall=[], keys=[], mass=[]))
      row['recall'].append(float(np.take_along_axis(seen, best, 1).mean()))
      row['keys'].append(float(seen.sum() / (T * (T - 1))))
      row['mass'].append(float((weights * seen).sum(1).mean()))
  return found


def exact() -> float:
  """Attention in a single bucket against a sum over all other tokens."""
  rng = np.random.default_rng(0)
  length = 96
  x, v = rng.standard_normal((2, length, 16))
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  scores = np.where(np.eye(length), -np.inf, x @ unit.T)
  weights = np.exp(scores)
  wanted = weights @ v / weights.sum(1, keepdims=True)
  arrays = (jnp.asarray(a[None, :, None], jnp.float32) for a in (x, unit, v))
  ids = jnp.zeros((1, length, 1, 2), jnp.int32)
  found = lsh_attention(
    *arrays, ids, num_buckets=1, chunk_size=length, causal=False
  )
  return float(np.abs(np.asarray(found)[0, :, 0] - wanted).max())


def hashing() -> dict:
  """R25."""
  return dict(
    costs=costs(),
    collisions={str(b): collisions(b) for b in (16, 64)},
    recall={kind: recall(kind) for kind in ('independent', 'clusters')},
    one_bucket=exact(),
  )


def found_in(values, kind, what='recall') -> list[float]:
  """The mean over seeds of a figure, by number of rounds."""
  return [fmean(row[what]) for row in values['recall'][kind].values()]


@statement(
  'Hashing costs O(n log n_B)',
  'FL p. 22, eq. 20-21',
  'O(n log n)',
  rule='exponent below 1.2, where buckets keep their size of 32 tokens',
)
def hashing_is_nearly_linear(v):
  one = v['costs']['hashing']['exponent']
  two = v['costs']['hashing by two factors']['exponent']
  text = f'n^{one:.2f}; with the buckets a product of two factors n^{two:.2f}'
  return holds(one < 1.2), text


@statement(
  'Similar vectors fall into the same bucket with high probability',
  'FL p. 22',
  rule='certain at 0 degrees, less at every larger angle, and at 15 more than '
  '5 times as at 90',
)
def near_vectors_collide(v):
  text = listed('{:.3f} at {}', v['collisions']['16'], ANGLES)
  falls = (
    s[0] == 1 and (np.diff(s) < 0).all() and s[1] > 5 * s[-1]
    for s in v['collisions'].values()
  )
  return holds(all(falls)), f'16 buckets: {text}'


@statement(
  'The keys of the largest weights are found in the bucket',
  'FL p. 22',
  rule=f'more than half of the {TOP} largest weights in one round, of '
  f'clustered and of independent vectors; restated if in {ROUNDS[-1]} rounds',
)
def large_weights_are_found(v):
  found = {kind: found_in(v, kind) for kind in v['recall']}
  text = '; '.join(
    f'{kind}: {x[0]:.2f} in one round, {x[-1]:.2f} in {ROUNDS[-1]}, of '
    f'{found_in(v, kind, "keys")[-1]:.2f} of all keys'
    for kind, x in found.items()
  )
  once, often = (all(x[i] > 0.5 for x in found.values()) for i in (0, -1))
  return holds(once, restated=often), text


@statement(
  'More rounds of hashing miss fewer similar vectors',
  'FL p. 22',
  rule=f'more of the {TOP} largest weights in each of {ROUNDS} rounds',
)
def rounds_find_more(v):
  found = {kind: found_in(v, kind) for kind in v['recall']}
  rows = [listed('{:.2f}', x) for x in found.values()]
  grows = ((np.diff(x) > 0).all() for x in found.values())
  return holds(all(grows)), listed('{}: {}', found, rows, by='; ')


def _plots(values) -> list:
  costs = page.curves(
    {
      f'{name}: N^{row["exponent"]:.2f}': (LENGTHS, row['cost'])
      for name, row in values['costs'].items()
    },
    'tokens N',
    'operations of one round',
    f'One head of {H} channels, 2 N / {CHUNK} buckets',
    log='xy',
  )
  collisions = page.curves(
    {f'{n} buckets': (ANGLES, y) for n, y in values['collisions'].items()},
    'angle of two vectors, degrees',
    'share a bucket',
    f'4000 rotations of {H} channels',
  )
  rows = [
    [kind, rounds, *(spread(row[what]) for what in ('keys', 'recall', 'mass'))]
    for kind, table in values['recall'].items()
    for rounds, row in table.items()
  ]
  head = ['vectors', 'rounds', 'keys in the bucket']
  head += [f'of the {TOP} largest weights', 'of the weight of all']
  return [costs, collisions, page.Table(head, rows)]


R25 = Claim(
  title='Attention in buckets of a hash',
  tier='b',
  measure=hashing,
  seeds=SEEDS,
  parts=_plots,
  statements=(
    hashing_is_nearly_linear,
    Statement(
      says='Sorting, and attention inside buckets, cost O(n log n)',
      source='FL p. 22',
      printed='O(n log n)',
      measured='n^{costs[sorting and attention][exponent]:.2f}'.format_map,
      judge=less('costs', 'sorting and attention', 'exponent', than=1.2),
      rule='exponent below 1.2',
    ),
    near_vectors_collide,
    large_weights_are_found,
    rounds_find_more,
    within(
      'With one bucket it is attention to all other tokens',
      f'{OURS}, on FL p. 22',
      '',
      'one_bucket',
      0,
      1e-5,
    ),
  ),
)

HASHING = {'R25': R25}
