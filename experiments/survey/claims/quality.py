"""What mixers recall and how well they model text, at equal size, trained."""

import pathlib
import tempfile

from tqdm import tqdm

from experiments import page
from experiments.ablations import harness, report, study
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  UNDEFINED,
  Claim,
  Statement,
)

STUDIES = pathlib.Path(__file__).resolve().parents[3] / 'configs' / 'ablations'


def run_study(name: str, **changes) -> dict:
  """Runs a study and returns what each architecture reached.

  Args:
    name: of a file of configs/ablations, with its argument.
    **changes: of the study.

  Returns:
    Architecture -> mean of the study's metric over seeds, the half width of its
    interval, and the sizes that were matched.
  """
  changes = {f'sweep.{key}': value for key, value in changes.items()}
  values, studied = study.load(f'{STUDIES}/{name}', changes)
  found = {}
  with tempfile.TemporaryDirectory() as folder:
    for plan in harness.plan(values, studied):
      name, steps = plan.program.name, plan.program.config.steps
      with tqdm(total=steps, desc=name, leave=False) as bar:
        record = harness.run(
          plan,
          studied,
          pathlib.Path(folder),
          lambda step, loss, bar=bar: bar.update(step - bar.n),
        )
      runs = report.best_runs(record, studied.metric)
      scores = [report.score(run, studied.metric) for run in runs]
      mean, half = report.interval(scores)
      found[name] = dict(mean=mean, half=half, seeds=len(runs), **plan.sizes)
  return found


def _shown(row, digits=3) -> str:
  return f'{row["mean"]:.{digits}f} ± {row["half"]:.{digits}f}'


def _above(a, b) -> bool:
  """Whether the interval of a is above that of b."""
  return a['mean'] - a['half'] > b['mean'] + b['half']


def _table(what: str):
  def parts(values):
    return [
      page.Table(
        ['mixer', what, '±', 'seeds', 'parameters', 'state bytes', 'FLOPs'],
        [
          [
            name,
            f'{row["mean"]:.3f}',
            f'{row["half"]:.3f}',
            row['seeds'],
            f'{row["params"]:,}',
            f'{row["state"]:,}',
            f'{row["flops"]:.3g}',
          ]
          for name, row in values.items()
        ],
      )
    ]

  return parts


def _ordering(values) -> str:
  return ', '.join(f'{name} {_shown(row)}' for name, row in values.items())


R21 = Claim(
  title='Associative recall of trained models',
  tier='b',
  measure=lambda: run_study('mqar.py:tiny', learning_rates=(1e-2,)),
  seeds=(0, 1, 2),
  parts=_table('accuracy'),
  statements=(
    Statement(
      says='Softmax attention recalls at least what the delta rule does, the '
      'delta rule more than gates, gates more than neither',
      source='S003 Master Comparison Table; AS p. 41',
      printed='softmax >= delta > gated > naive',
      measured=_ordering,
      judge=lambda v: (
        HOLDS
        if not _above(v['deltanet'], v['attention'])
        and _above(v['deltanet'], v['gla'])
        and _above(v['gla'], v['linear'])
        else RESTATED
        if _above(v['deltanet'], v['linear'])
        else FAILS
      ),
      rule='by intervals; restated if attention and the delta rule are above '
      'the ungated recurrence, wherever the gated one is',
    ),
    Statement(
      says='Mamba struggles with exact recall',
      source='S003 State Space Models (Mamba)',
      measured=lambda v: _shown(v['mamba']),
      judge=lambda v: HOLDS if _above(v['deltanet'], v['mamba']) else FAILS,
      rule='its interval is below that of the delta rule, whose state is about '
      'as large',
    ),
  ),
)

# Quality beside softmax attention as the guide prints it, in percent.
PRINTED = {'linear': 95, 'gated_deltanet': 99}


def _percent(values, name) -> float:
  """The loss of attention over that of another, in percent."""
  return 100 * values['attention']['mean'] / values[name]['mean']


def _quality(name) -> Statement:
  return Statement(
    says=f'{name} has {PRINTED[name]} percent of the quality of softmax '
    'attention',
    source='S003 Master Comparison Table',
    printed=f'{PRINTED[name]} %',
    measured=lambda v: (
      f'bits per byte {_shown(v[name])}, {_percent(v, name):.1f} % of '
      f'{_shown(v["attention"])}'
    ),
    judge=lambda v: UNDEFINED,
    rule='no metric, size or data is stated; measured as the bits per byte of '
    'attention over its own, at equal parameters',
  )


R29 = Claim(
  title='Language modelling by mixer, at equal parameters',
  tier='b',
  measure=lambda: run_study('lm_quality.py:tiny'),
  seeds=(0, 1, 2),
  parts=_table('bits per byte'),
  statements=(
    *map(_quality, PRINTED),
    Statement(
      says='Three recurrent layers and one of attention are better than '
      'attention alone',
      source='S003 Hybrid Architectures (Kimi Linear)',
      printed='101 %',
      measured=lambda v: (
        f'{_shown(v["3 gated_deltanet : 1 attention"])} against '
        f'{_shown(v["attention"])} bits per byte'
      ),
      judge=lambda v: (
        HOLDS
        if _above(v['attention'], v['3 gated_deltanet : 1 attention'])
        else FAILS
      ),
      rule='by intervals over seeds, at equal parameters and steps',
    ),
  ),
)

QUALITY = {'R21': R21, 'R29': R29}
