"""Keys and values in pieces and in pages, which attention reads as one."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.softmax.attention_merge import split_attention
from efficient_attn.ops.softmax.paged_attention import paged_attention
from experiments.errors import largest
from experiments.survey import oracles
from experiments.survey.claim import Claim, within
from experiments.survey.seeds import SEEDS

HEADS, WIDTH = 2, 64
# Float64 rounds sums of 4096 terms to 4096 x 1e-16 at the worst.
EXACT = 1e-12
REASON = 'rounding of float64, in sums of up to 4096 terms'
SPLITS = (1, 2, 3, 7, 16, 33, 64)


def pieces() -> dict:
  """R13: attention to pieces of the keys, merged, by seed, in float64."""
  return dict(error=max(map(merged, SEEDS)))


def merged(seed: int, length=4096) -> float:
  """The largest error over numbers of pieces, relative."""
  rng = np.random.default_rng(seed)
  q, k, v = rng.standard_normal((3, length, HEADS, WIDTH))
  q = q[-1:]
  wanted = oracles.softmax_attention(q, k, v)
  with jax.enable_x64(True):
    arrays = [jnp.asarray(x)[None] for x in (q, k, v)]
    return max(
      largest(split_attention(*arrays, num_splits=n)[0][0], wanted)
      for n in SPLITS
    )


R13 = Claim(
  title='Decoding in pieces merges exactly',
  tier='b',
  measure=pieces,
  seeds=SEEDS,
  statements=(
    within(
      'Pieces of the keys attended apart merge exactly',
      'AS p. 15',
      'exact',
      'error',
      0,
      EXACT,
      reason=REASON,
    ),
  ),
)

PAGE, REQUESTS, RUNNING, LONGEST = 16, 200, 8, 1024


def served(seed: int) -> tuple[list[list[int]], list[int], list[float]]:
  """Serves requests from one pool, whose pages go from hand to hand.

  Requests of lognormal length come one after another; each takes a page when
  its last is full, and with RUNNING others there the oldest gives all of its
  back.

  Returns:
    Pages and lengths of the requests that still run, and the share of slots
    without a token, after every request.
  """
  rng = np.random.default_rng(seed)
  free = list(rng.permutation((RUNNING + 1) * LONGEST // PAGE))
  tables, lengths, waste = [], [], []
  for drawn in rng.lognormal(5.5, 1.0, REQUESTS):
    length = min(1 + int(drawn), LONGEST)
    pages = []
    for token in range(length):
      if token % PAGE == 0:
        pages.append(free.pop())
    tables.append(pages)
    lengths.append(length)
    if len(tables) > RUNNING:
      free = tables.pop(0) + free
      lengths.pop(0)
    waste.append(1 - sum(lengths) / (PAGE * sum(map(len, tables))))
  return tables, lengths, waste


def read_from_pages(seed: int) -> float:
  """The error of attention of what still runs, through its pages."""
  tables, lengths, _ = served(seed)
  rng = np.random.default_rng(seed)
  size = max(map(max, tables)) + 1
  keys, values = np.full((2, size, PAGE, HEADS, WIDTH), np.nan)
  q = rng.standard_normal((RUNNING, HEADS, WIDTH))
  table = np.zeros((RUNNING, LONGEST // PAGE), int)
  wanted = []
  for b, (pages, length) in enumerate(zip(tables, lengths, strict=True)):
    k, v = rng.standard_normal((2, length, HEADS, WIDTH))
    table[b, : len(pages)] = pages
    for pool, x in ((keys, k), (values, v)):
      for i, number in enumerate(pages):
        part = x[i * PAGE : (i + 1) * PAGE]
        pool[number, : len(part)] = part
    wanted.append(oracles.softmax_attention(q[b][None], k, v)[0])
  with jax.enable_x64(True):
    arrays = (q[:, None], keys, values, table, np.array(lengths))
    ours = paged_attention(*map(jnp.asarray, arrays))
    return largest(ours[:, 0], np.stack(wanted))


def pages() -> dict:
  """R14: paged attention against its definition, and the slots it wastes."""
  waste = [served(seed)[2] for seed in SEEDS]
  _, lengths, _ = served(SEEDS[0])
  return dict(
    error=max(map(read_from_pages, SEEDS)),
    waste=float(np.mean(waste)),
    waste_reserved=1 - sum(lengths) / (LONGEST * len(lengths)),
  )


R14 = Claim(
  title='Pages waste almost no memory',
  tier='b',
  measure=pages,
  seeds=SEEDS,
  statements=(
    within(
      'Paged attention gives what contiguous attention gives',
      'AS p. 15',
      'exact',
      'error',
      0,
      EXACT,
      reason=REASON,
    ),
    within(
      'Waste is near zero',
      'AS p. 15',
      'near-zero',
      'waste',
      0,
      0.05,
      unit='of the slots in the tables that the op reads',
      reason='a limit of ours; a lognormal trace, 245 tokens in the median',
    ),
  ),
)

LAYOUTS = {'R13': R13, 'R14': R14}
