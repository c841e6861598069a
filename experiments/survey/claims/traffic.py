"""What attention moves: bytes by kernel and by tile, and what that takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import ops
from efficient_attn.models import cost
from efficient_attn.ops.softmax.attention_tiles import by_keys, tile_schedule
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  Claim,
  Statement,
  equals,
  less,
  within,
)

# FLOP/s and bytes/s of data sheets, dense products in 16 bits.
A100 = dict(flops=312e12, bandwidth=2e12)
H200 = dict(flops=989e12, bandwidth=4.8e12)


def roofline() -> dict:
  """R02: the example of 100K tokens of one head, on data sheets.

  Of what dense attention moves, only the matrices count that three kernels
  write and read again: scores and weights, twice each.
  """
  x = jax.ShapeDtypeStruct((1, 100_000, 1, 64), jnp.float16)
  dense = functools.partial(ops.attention, implementation='reference')
  flops = cost.flops(dense, x, x, x)
  scores = 2 * cost.largest_array(dense, x, x, x)  # bytes in 16 bits
  found = dict(scores_gib=scores / 2**30)
  for name, chip in (('a100', A100), ('h200', H200)):
    found[f'{name}_compute_ms'] = 1e3 * flops / chip['flops']
    found[f'{name}_io_ms'] = 1e3 * 4 * scores / chip['bandwidth']
    found[f'{name}_ratio'] = (
      found[f'{name}_io_ms'] / found[f'{name}_compute_ms']
    )
  return found


R02 = Claim(
  title='Dense attention of 100K tokens waits for memory',
  tier='a',
  measure=roofline,
  statements=(
    equals(
      'The scores take 19 GB',
      'AS p. 8',
      '19 GB',
      'scores_gib',
      19,
      unit='GiB',
    ),
    equals(
      'Computing takes 8.2 ms on an A100',
      'AS p. 8',
      '8.2 ms',
      'a100_compute_ms',
      8.2,
      unit='ms at the peak of the data sheet',
    ),
    equals(
      'Moving data takes 40 ms',
      'AS p. 9',
      '40 ms',
      'a100_io_ms',
      40,
      unit='ms at the bandwidth of the data sheet',
    ),
    within(
      'Moving data takes nearly five times as long',
      'AS p. 9',
      '5x',
      'a100_ratio',
      4.5,
      5,
    ),
  ),
)


def tile_traffic(length: int, order: str, block=(128, 128), width=64) -> dict:
  """Elements of fast-memory loads and stores of tiled attention.

  Walks the tiles of the framework's own schedule. What stays from one tile to
  the next is not loaded again; there is no other cache.
  """
  tiles = tile_schedule(None, length, length, *block)
  if order == 'key':
    tiles = by_keys(tiles)
  rows, cols = tiles[:, 0], tiles[:, 1]
  new_row = np.diff(rows, prepend=-1) != 0
  new_col = np.diff(cols, prepend=-1) != 0
  query, key = (size * width for size in block)
  loads = new_row.sum() * query + 2 * new_col.sum() * key
  if order == 'key':  # output and statistics, at every tile
    running = query + 2 * block[0]
    loads += len(tiles) * running
    stores = len(tiles) * running
  else:  # once for each block of rows
    stores = new_row.sum() * (query + block[0])
  return dict(loads=int(loads), stores=int(stores))


LENGTHS = [2**n for n in range(10, 16)]


def flash_traffic() -> dict:
  """R09: traffic against the length, and against the other block."""
  found = dict(lengths=LENGTHS)
  for order in ('key', 'query'):
    counts = [tile_traffic(n, order) for n in LENGTHS]
    for what in ('loads', 'stores'):
      found[f'{order}_{what}'] = [count[what] for count in counts]
    total = [count['loads'] + count['stores'] for count in counts]
    found[f'{order}_total'] = total
    found[f'{order}_slope'] = slope(LENGTHS[2:], total[2:])
    found[f'{order}_store_slope'] = slope(
      LENGTHS[2:], found[f'{order}_stores'][2:]
    )
    doubled = (256, 128) if order == 'query' else (128, 256)
    count = tile_traffic(LENGTHS[-1], order, doubled)
    found[f'{order}_wider'] = total[-1] / (count['loads'] + count['stores'])
  return found


def _flash_plot(values) -> list:
  return [
    page.curves(
      {
        f'{name}: N^{values[f"{order}_slope"]:.2f}': (
          values['lengths'],
          values[f'{order}_total'],
        )
        for order, name in (
          ('key', 'keys outside (FlashAttention)'),
          ('query', 'queries outside (FlashAttention-2)'),
        )
      },
      'tokens N',
      'elements moved',
      'Traffic of tiled attention, tiles of 128 x 128',
      log='xy',
    )
  ]


R09 = Claim(
  title='What tiled attention reads and writes',
  tier='a',
  measure=flash_traffic,
  parts=_flash_plot,
  statements=(
    within(
      'FlashAttention moves O(N^2 d / b_kv) elements',
      'AS p. 14',
      'O(N^2)',
      'key_slope',
      1.9,
      2.05,
    ),
    within(
      'FlashAttention moves half as much with keys in blocks twice as large',
      'AS p. 14',
      '2x',
      'key_wider',
      1.9,
      2.05,
    ),
    Statement(
      says='FlashAttention-2 moves O(N d) elements in total',
      source='AS p. 7 and 14',
      printed='O(N)',
      measured=(
        'N^{query_slope:.2f}; only what is written is N^{query_store_slope:.2f}'
      ).format_map,
      judge=less('query_slope', than=1.1),
      rule='exponent below 1.1',
    ),
  ),
)

TRAFFIC = {'R02': R02, 'R09': R09}
