"""Sparse attention: its budgets, its blocks, its bytes and its bounds."""

from statistics import fmean

from experiments import page
from experiments.survey import sparse_counts as counts
from experiments.survey import sparse_curves as curves
from experiments.survey.claim import (
  FAILS,
  OPEN,
  RESTATED,
  Claim,
  Statement,
  elsewhere,
  holds,
  less,
  listed,
  statement,
  within,
)
from experiments.survey.sources import OURS

SHOWN = ('retrieval', 'sparq', 'quest', 'xattention')


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
  @statement(
    f'{method} is {printed}x as fast as dense attention',
    where,
    f'{printed}x',
    rule='not contradicted if attention has at least so many times its work; '
    "a time of ours would say nothing of the authors' kernel and machine",
  )
  def work_allows_it(v):
    return OPEN if v[key] >= printed else FAILS, f'{v[key]:.1f}x less work'

  return work_allows_it


@statement(
  'Sparse attention with everything kept is attention',
  f'{OURS}, on AS eq. 39-42',
  rule='largest difference of the output below 1e-5, float32',
)
def everything_kept_is_attention(v):
  worst = max(v['whole'].values())
  return holds(worst < 1e-5), f'{worst:.1e} over {len(v["whole"])} methods'


@statement(
  'Chosen keys hold more of the attention than as many random ones',
  f'{OURS}, on AS table 4',
  rule='for every method, budget and seed',
)
def mass_exceeds_keys(v):
  def at(name, share):
    return [curves.at(v, name, share, figure) for figure in (0, 1)]

  means = [[fmean(x) for x in at(name, 0.25)] for name in SHOWN]
  text = listed('{0} {1[1]:.2f} of {1[0]:.2f} of the keys', SHOWN, means)
  more = (
    mass > keys
    for name in curves.ROWS
    for share in curves.SHARES[:-1]
    for keys, mass in zip(*at(name, share), strict=True)
  )
  return holds(all(more)), f'mass at a budget of 0.25: {text}'


@statement(
  'Choosing by the scores keeps more than a fixed pattern does',
  f'{OURS}, on AS section 6',
  rule='0.01 more mass than StreamingLLM with as many keys, on heads with '
  'sinks, a diagonal and heavy hitters; restated if only some do',
)
def scores_beat_a_pattern(v):
  names, better = curves.dynamic(), len(curves.better(v))
  text = listed('{} {:+.2f}', names, [curves.beyond(v, n) for n in names])
  verdict = holds(better == len(names), restated=better > 0)
  return verdict, f'{better} of {len(names)}: {text}'


@statement(
  "Quest's bound is never below a product of its page",
  'AS p. 29',
  rule='no violation',
)
def bounds_bound(v):
  verdict = holds(not v['bounds']['wrong'])
  return verdict, '{wrong} of {total} pages'.format(**v['bounds'])


@statement(
  'STA computes blocks that are dense or empty, none in between',
  'AS p. 24',
  rule='none mixed',
)
def no_tile_is_mixed(v):
  form = 'windows of {0}: {1[full]} full, {1[mixed]} mixed'
  text = listed(form, v['windows'], v['windows'].values())
  return holds(not v['windows']['tiles']['mixed']), text


@statement(
  'PAROAttention gathers a strided pattern into blocks',
  'AS p. 24-25',
  rule='a quarter of the blocks or less, for a head that looks along one axis',
)
def permuted_tokens_need_few_blocks(v):
  before, after = v['permuted']['before'], v['permuted']['after']
  text = f'{before:.1%} of the blocks -> {after:.1%}'
  return holds(after < 0.25 * before), text


@statement(
  'Radial attention computes O(N log N) pairs',
  'AS p. 23-24',
  'O(N log N)',
  rule='flat to a fifth from 16 to 128 frames; restated if frames with more '
  'tokens cost more than N^1.3',
)
def radial_pairs_are_n_log_n(v):
  ratios, exponent = v['radial']['ratios'], v['radial']['exponent']
  flat = max(ratios) <= 1.2 * min(ratios)
  text = (
    f'pairs over F log F of F frames: {listed("{:.2f}", ratios)}; '
    f'N^{exponent:.2f} with larger frames'
  )
  return holds(flat and exponent < 1.3, restated=flat), text


@statement(
  'NSA gains 6 to 11.6 times when decoding',
  'AS p. 28',
  '6 to 11.6x',
  rule='within 3 percent of 11.6 at 65,536 tokens: it is a count of what is '
  'read, not a time',
)
def nsa_reads_as_printed(v):
  near = abs(v['nsa']['65536'] / 11.6 - 1) < 0.03
  form, lengths = '{:.1f} at {:,} tokens', map(int, v['nsa'])
  text = listed(form, v['nsa'].values(), lengths)
  verdict = RESTATED if near else FAILS
  return verdict, f'keys of attention over keys of NSA: {text}'


@statement(
  'H2O keeps k tokens whatever the length',
  'AS p. 25',
  'k',
  rule='k after a prompt and after every token',
)
def h2o_keeps_its_budget(v):
  held = v['h2o']
  return holds(set(held) == {16}), f'{held[0]} to {held[-1]} of a budget of 16'


R27 = Claim(
  title='Sparse attention: what is kept for what is computed',
  tier='b',
  measure=sparse_attention,
  seeds=curves.CURVE_SEEDS,
  parts=_parts,
  statements=(
    everything_kept_is_attention,
    mass_exceeds_keys,
    scores_beat_a_pattern,
    bounds_bound,
    within(
      'XAttention sums antidiagonals by a product of folded rows',
      'AS p. 30',
      'equal',
      'antidiagonals',
      0,
      1e-12,
    ),
    no_tile_is_mixed,
    permuted_tokens_need_few_blocks,
    radial_pairs_are_n_log_n,
    nsa_reads_as_printed,
    Statement(
      says='NSA reduces what the cache stores',
      source='AS table 4',
      printed='yes',
      measured='{stored[nsa]:.2f} of the bytes of attention'.format_map,
      judge=less('stored', 'nsa', than=1),
      rule='less than the cache of attention with as many kv heads, 64K tokens',
    ),
    h2o_keeps_its_budget,
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
