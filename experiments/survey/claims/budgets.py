"""Sparse attention: its budgets, its blocks, its bytes and its bounds."""

from statistics import fmean

from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  OPEN,
  RESTATED,
  Claim,
  Statement,
  elsewhere,
  within,
)
from experiments.survey.claims import sparse_counts as counts
from experiments.survey.claims import sparse_curves as curves
from experiments.survey.sources import OURS


def sparse_attention() -> dict:
  """R27: curves of the selectors by seed, and what is counted."""
  found = curves.curves()
  whole = counts.whole_budget()
  for name in curves.ROWS:
    whole[name] = max(points[-1][2] for points in found[name])
  return dict(
    curves=found,
    whole=whole,
    bounds=counts.page_bounds(),
    antidiagonals=counts.antidiagonals(),
    windows=counts.tiles_of_windows(),
    sta=1 / (1 - counts.tile_sparsity()),
    permuted=counts.permuted_blocks(),
    radial=counts.radial(),
    nsa=counts.nsa_reads(),
    moba=counts.moba_work(),
    stored=counts.stored(),
    h2o=counts.held_by_h2o(),
  )


def _parts(values) -> list:
  bounds = page.Table(
    ['method', 'printed speed', 'work of attention over its work'],
    [
      ['STA, 3 x 3 x 3 of 5 x 6 x 10 tiles', '10.45x', values['sta']],
      ['NSA, a token after 64K', '11.6x', values['nsa']['65536']],
      ['MoBA, 12 of 256 blocks, 1M tokens', '6.5x', values['moba']],
    ],
  )
  return [*curves.parts(values), bounds]


def _speed(method: str, printed: float, key: str, where: str) -> Statement:
  def judge(v):
    return OPEN if v[key] >= printed else FAILS

  return Statement(
    says=f'{method} is {printed}x as fast as dense attention',
    source=where,
    printed=f'{printed}x',
    measured=lambda v: f'{v[key]:.1f}x less work',
    judge=judge,
    rule='not contradicted if attention has at least so many times its work; '
    "a time of ours would say nothing of the authors' kernel and machine",
  )


R27 = Claim(
  title='Sparse attention: what is kept for what is computed',
  tier='b',
  measure=sparse_attention,
  seeds=curves.CURVE_SEEDS,
  parts=_parts,
  statements=(
    Statement(
      says='Sparse attention with everything kept is attention',
      source=f'{OURS}, on AS eq. 39-42',
      measured=lambda v: (
        f'{max(v["whole"].values()):.1e} over {len(v["whole"])} methods'
      ),
      judge=lambda v: HOLDS if max(v['whole'].values()) < 1e-5 else FAILS,
      rule='largest difference of the output below 1e-5, float32',
    ),
    Statement(
      says='Chosen keys hold more of the attention than as many random ones',
      source=f'{OURS}, on AS table 4',
      measured=lambda v: (
        'mass at a budget of 0.25: '
        + ', '.join(
          f'{name} {fmean(curves.at(v, name, 0.25, 1)):.2f} of '
          f'{fmean(curves.at(v, name, 0.25, 0)):.2f} of the keys'
          for name in ('retrieval', 'sparq', 'quest', 'xattention')
        )
      ),
      judge=lambda v: (
        HOLDS
        if all(
          mass > keys
          for name in curves.ROWS
          for share in curves.SHARES[:-1]
          for keys, mass in zip(
            *(curves.at(v, name, share, i) for i in (0, 1)), strict=True
          )
        )
        else FAILS
      ),
      rule='for every method, budget and seed',
    ),
    Statement(
      says='Choosing by the scores keeps more than a fixed pattern does',
      source=f'{OURS}, on AS section 6',
      measured=lambda v: (
        f'{len(curves.better(v))} of {len(curves.dynamic())}: '
        + ', '.join(f'{n} {curves.beyond(v, n):+.2f}' for n in curves.dynamic())
      ),
      judge=lambda v: (
        HOLDS
        if len(curves.better(v)) == len(curves.dynamic())
        else RESTATED
        if curves.better(v)
        else FAILS
      ),
      rule='0.01 more mass than StreamingLLM with as many keys, on heads with '
      'sinks, a diagonal and heavy hitters; restated if only some do',
    ),
    Statement(
      says="Quest's bound is never below a product of its page",
      source='AS p. 29',
      measured=lambda v: '{wrong} of {total} pages'.format(**v['bounds']),
      judge=lambda v: FAILS if v['bounds']['wrong'] else HOLDS,
      rule='no violation',
    ),
    within(
      'XAttention sums antidiagonals by a product of folded rows',
      'AS p. 30',
      'equal',
      'antidiagonals',
      0,
      1e-12,
    ),
    Statement(
      says='STA computes blocks that are dense or empty, none in between',
      source='AS p. 24',
      measured=lambda v: ', '.join(
        f'windows of {name}: {found["full"]} full, {found["mixed"]} mixed'
        for name, found in v['windows'].items()
      ),
      judge=lambda v: FAILS if v['windows']['tiles']['mixed'] else HOLDS,
      rule='none mixed',
    ),
    Statement(
      says='PAROAttention gathers a strided pattern into blocks',
      source='AS p. 24-25',
      measured=lambda v: '{before:.1%} of the blocks -> {after:.1%}'.format(
        **v['permuted']
      ),
      judge=lambda v: (
        HOLDS
        if v['permuted']['after'] < 0.25 * v['permuted']['before']
        else FAILS
      ),
      rule='a quarter of the blocks or less, for a head that looks along one '
      'axis',
    ),
    Statement(
      says='Radial attention computes O(N log N) pairs',
      source='AS p. 23-24',
      printed='O(N log N)',
      measured=lambda v: (
        'pairs over F log F of F frames: '
        + ', '.join(f'{x:.2f}' for x in v['radial']['ratios'])
        + f'; N^{v["radial"]["exponent"]:.2f} with larger frames'
      ),
      judge=lambda v: (
        FAILS
        if max(v['radial']['ratios']) > 1.2 * min(v['radial']['ratios'])
        else HOLDS
        if v['radial']['exponent'] < 1.3
        else RESTATED
      ),
      rule='flat to a fifth from 16 to 128 frames; restated if frames with '
      'more tokens cost more than N^1.3',
    ),
    Statement(
      says='NSA gains 6 to 11.6 times when decoding',
      source='AS p. 28',
      printed='6 to 11.6x',
      measured=lambda v: (
        'keys of attention over keys of NSA: '
        + ', '.join(
          f'{x:.1f} at {int(n):,} tokens' for n, x in v['nsa'].items()
        )
      ),
      judge=lambda v: (
        RESTATED if abs(v['nsa']['65536'] / 11.6 - 1) < 0.03 else FAILS
      ),
      rule='within 3 percent of 11.6 at 65,536 tokens: it is a count of what '
      'is read, not a time',
    ),
    Statement(
      says='NSA reduces what the cache stores',
      source='AS table 4',
      printed='yes',
      measured=lambda v: f'{v["stored"]["nsa"]:.2f} of the bytes of attention',
      judge=lambda v: HOLDS if v['stored']['nsa'] < 1 else FAILS,
      rule='less than the cache of attention with as many kv heads, 64K tokens',
    ),
    Statement(
      says='H2O keeps k tokens whatever the length',
      source='AS p. 25',
      printed='k',
      measured=lambda v: f'{v["h2o"][0]} to {v["h2o"][-1]} of a budget of 16',
      judge=lambda v: HOLDS if set(v['h2o']) == {16} else FAILS,
      rule='k after a prompt and after every token',
    ),
    _speed('STA', 10.45, 'sta', 'AS p. 24'),
    _speed('MoBA', 6.5, 'moba', 'AS p. 28'),
    elsewhere(
      'Quest is 7.03x as fast as dense attention',
      'AS p. 29',
      '7.03x',
      "the authors' kernel and their machine",
    ),
  ),
)

BUDGETS = {'R27': R27}
