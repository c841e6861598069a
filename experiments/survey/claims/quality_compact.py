"""What compact, sparse and linear attention lose beside softmax attention."""

from collections.abc import Mapping

from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  UNDEFINED,
  Claim,
  Statement,
)
from experiments.survey.claims.quality import run_study
from experiments.survey.claims.quality_rows import ends, shown

# By name: the row and its options, with heads of 16 channels.
ROWS = {
  'attention': ('attention', {}),
  'MQA': ('attention', dict(num_kv_heads=1)),
  'MLA': ('mla', dict(kv_rank=16, rope_dim=8, nope_dim=16, value_dim=16)),
  'sparse': ('window', dict(window=32)),
  'linear': ('linear', {}),
}
LITTLE, STEPS = 2, 100  # percent, and steps of training


def measure() -> dict:
  """R47: bits per byte of each row."""
  return run_study(
    'lm_quality.py:tiny',
    architectures={
      name: {
        'steps': STEPS,
        'model.pattern': (row,),
        f'model.mixers.{row}': options,
      }
      for name, (row, options) in ROWS.items()
    },
    learning_rates=(6e-3,),
  )


def loss(values: Mapping, name: str) -> tuple[float, float]:
  """Least and most of the bits per byte that a row adds, in percent."""
  (low, high), (least, most) = ends(values['attention']), ends(values[name])
  return 100 * (least / high - 1), 100 * (most / low - 1)


def losses(names):
  """How what these rows add is shown."""

  def measured(values):
    spans = {name: loss(values, name) for name in names}
    return ', '.join(
      f'{name} {least:+.1f} to {most:+.1f} %'
      for name, (least, most) in spans.items()
    )

  return measured


def little(names):
  """No loss that is seen; or none above LITTLE; or a larger one."""

  def judge(values):
    least = max(loss(values, name)[0] for name in names)
    mean = max(
      100 * (values[name]['mean'] / values['attention']['mean'] - 1)
      for name in names
    )
    if least <= 0 and mean <= LITTLE:
      return HOLDS
    return RESTATED if mean <= LITTLE else FAILS

  return judge


def order(values) -> str:
  """Attention before MQA, and that before sparse and linear attention."""
  groups = ('attention',), ('MQA',), ('sparse', 'linear')
  means = [[values[name]['mean'] for name in group] for group in groups]
  if not all(
    max(better) < min(worse)
    for better, worse in zip(means, means[1:], strict=False)
  ):
    return FAILS
  apart = all(
    ends(values[better])[1] < ends(values[worse])[0]
    for group, following in zip(groups, groups[1:], strict=False)
    for better in group
    for worse in following
  )
  return HOLDS if apart else UNDEFINED


def means(values) -> str:
  """Bits per byte of all rows."""
  return ', '.join(f'{name} {shown(row)}' for name, row in values.items())


def table(values) -> list:
  """What was trained."""
  head = ['attention', 'bits per byte', '±', 'parameters', 'state bytes']
  rows = [
    [
      name,
      f'{row["mean"]:.3f}',
      f'{row["half"]:.3f}',
      f'{row["params"]:,}',
      f'{row["state"]:,}',
    ]
    for name, row in values.items()
  ]
  note = (
    'Decoders of 4 layers on 128 bytes of source code, 4 heads of 16 channels '
    f'before parameters are matched, {STEPS} steps: one kv head (MQA), a '
    'latent of 16 channels and 8 that rotate (MLA), windows of 32 (sparse).'
  )
  return [page.Table(head, rows), page.Text(note, note=True)]


RULE = (
  'no loss that exceeds the intervals of 3 seeds, and a mean loss of '
  f'{LITTLE} percent or less of the bits per byte, at parameters matched to 10 '
  'percent; restated if the loss is as small but seen'
)
R47 = Claim(
  title='Quality of compact, sparse and linear attention',
  tier='b',
  measure=measure,
  seeds=(0, 1, 2),
  parts=table,
  statements=(
    Statement(
      says='Compact attention is nearly exact',
      source='S001 Complexity Comparison',
      printed='~Exact',
      measured=losses(('MQA',)),
      judge=little(('MQA',)),
      rule=RULE,
    ),
    Statement(
      says='Latent attention compresses the cache with minimal loss of quality',
      source='S003 Multi-Head Latent Attention (MLA)',
      printed='minimal quality loss',
      measured=losses(('MLA',)),
      judge=little(('MLA',)),
      rule=RULE,
    ),
    Statement(
      says='FlashAttention has five stars of quality, GQA and MQA four, sparse '
      'and linear attention three',
      source='S000 Efficiency Trade-offs',
      printed='5, 4, 3, 3 stars',
      measured=means,
      judge=order,
      rule='attention needs fewer bits per byte than MQA, and that than '
      'windows and linear attention; not well defined if so only by '
      'means and not by intervals, since no metric is stated',
    ),
  ),
)

QUALITY_COMPACT = {'R47': R47}
