"""Rows of the master comparison that another claim does not train.

A decoder reads text where the row can decode. Linformer cannot: its row reads
images, patch by patch.
"""

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
from experiments.survey.sources import OURS

# The rows by our name: what they are called, the percentage, and its print.
PRINTED = {
  'window': ('Sliding Window', 98, '~98%'),
  'reformer': ('LSH (Reformer)', 97, '~97%'),
  'mamba': ('Mamba', 97, '~97%'),
  'linformer': ('Linformer', 96, '~96%'),
}
DECODERS = ('window', 'reformer', 'mamba')
# A quarter of the 128 bytes; two rounds of buckets of 16 of them.
TEXT = {
  'attention': {},
  'window': dict(window=32),
  'reformer': dict(num_buckets=8, chunk_size=16, num_hashes=2),
  'mamba': {},
}
# A quarter of the 16 patches.
IMAGES = {'attention': {}, 'linformer': dict(rank=4, max_len=16)}


def architectures(rows: Mapping[str, dict]) -> dict:
  """Returns the changes of a study: one architecture for each row."""
  return {
    name: {'model.pattern': (name,), f'model.mixers.{name}': options}
    for name, options in rows.items()
  }


def text() -> dict:
  """R43: bits per byte of decoders."""
  return dict(
    text=run_study(
      'lm_quality.py:tiny',
      architectures=architectures(TEXT),
      learning_rates=(6e-3,),
    )
  )


def images() -> dict:
  """R51: accuracy of encoders."""
  return dict(
    images=run_study(
      'vit_mixers.py:tiny',
      architectures=architectures(IMAGES),
      learning_rates=(3e-3, 1e-2),
    )
  )


def task(name: str) -> str:
  """What a row is trained on."""
  return 'text' if name in TEXT else 'images'


def ends(row: Mapping) -> tuple[float, float]:
  """The interval of a score over seeds."""
  return row['mean'] - row['half'], row['mean'] + row['half']


def percent(values: Mapping, name: str) -> tuple[float, float]:
  """Least and most of a row's quality, in percent of attention's.

  The better the more bits per byte attention needs, or the less it gets right.
  """
  found = values[task(name)]
  (low, high), (least, most) = ends(found['attention']), ends(found[name])
  if task(name) == 'text':
    return 100 * low / most, 100 * high / least
  return 100 * least / high, 100 * most / low


def shown(row: Mapping) -> str:
  """A score with the half width of its interval."""
  return f'{row["mean"]:.3f} ± {row["half"]:.3f}'


def quality(name: str) -> Statement:
  """One cell of the column of quality."""
  title, value, printed = PRINTED[name]
  metric = {'text': 'bits per byte', 'images': 'accuracy'}[task(name)]

  def measured(values):
    found = values[task(name)]
    least, most = percent(values, name)
    return (
      f'{metric} {shown(found[name])}, {least:.0f} to {most:.0f} % of '
      f'{shown(found["attention"])}'
    )

  def judge(values):
    least, most = percent(values, name)
    return RESTATED if least <= value <= most else UNDEFINED

  return Statement(
    says=f'{title} has about {value} percent of the quality of attention',
    source='S003 Master Comparison Table',
    printed=printed,
    measured=measured,
    judge=judge,
    rule='no metric, size or data is stated; restated if it lies in the '
    f'interval of the {metric} relative to that of attention, at parameters '
    'matched to 10 percent and equal steps, 3 seeds',
  )


def none_better(values) -> str:
  """No interval above that of attention, one at least below."""
  spans = [percent(values, name) for name in DECODERS]
  if any(least > 100 for least, _ in spans):
    return FAILS
  return HOLDS if any(most < 100 for _, most in spans) else UNDEFINED


def spans(values) -> str:
  """The percentages of all rows."""
  found = {name: percent(values, name) for name in DECODERS}
  return ', '.join(
    f'{name} {least:.0f} to {most:.0f} %'
    for name, (least, most) in found.items()
  )


def tables(values) -> list:
  """What was trained, and what it reached."""
  head = ['task', 'mixer', 'score', '±', 'seeds', 'parameters', 'FLOPs']
  made = [
    [
      what,
      name,
      f'{row["mean"]:.3f}',
      f'{row["half"]:.3f}',
      row['seeds'],
      f'{row["params"]:,}',
      f'{row["flops"]:.3g}',
    ]
    for what, found in values.items()
    for name, row in found.items()
  ]
  note = (
    'Text: bits per byte of decoders of 4 layers on 128 bytes of source code, '
    'at one learning rate, windows of 32, two rounds of buckets of 16. Images: '
    'accuracy of encoders of 2 layers on digits in 16 patches, of which '
    'Linformer makes 4 rows, at the better of two learning rates.'
  )
  return [page.Table(head, made), page.Text(note, note=True)]


R43 = Claim(
  title='Quality of windows, hashing and Mamba, trained',
  tier='b',
  measure=text,
  seeds=(0, 1, 2),
  parts=tables,
  statements=(
    *map(quality, DECODERS),
    Statement(
      says='Windows, hashing and Mamba lose quality',
      source=f'{OURS}, on S003 Master Comparison Table',
      measured=spans,
      judge=none_better,
      rule='by intervals: none is above attention, and one is below; not well '
      'defined if none differs',
    ),
  ),
)
R51 = Claim(
  title='Quality of Linformer, trained',
  tier='b',
  measure=images,
  seeds=(0, 1, 2),
  parts=tables,
  statements=(quality('linformer'),),
)

QUALITY_ROWS = {'R43': R43, 'R51': R51}
