"""The tables and plots of a study, from its stored records."""

import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from experiments import page
from experiments.ablations.study import Study

LEVEL = 0.95  # of the intervals


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and the half width of its Student interval."""
  mean = statistics.fmean(values)
  if len(values) < 2:
    return mean, math.nan
  spread = statistics.stdev(values) / math.sqrt(len(values))
  return mean, spread * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)


def best_runs(record: Mapping, metric: str, test: str | None = None) -> list:
  """Returns the runs, one a seed, of the best learning rate and decay.

  The best have the best mean of `metric` over seeds and tests; NaN is worst.
  """
  grid = {}
  for run in record['runs']:
    pair = run['learning_rate'], run['weight_decay']
    grid.setdefault(pair, []).append(run)
  sign = -1 if 'loss' in metric or 'bits' in metric else 1

  def goodness(runs):
    mean = statistics.fmean(score(run, metric, test) for run in runs)
    return -math.inf if math.isnan(mean) else sign * mean

  return max(grid.values(), key=goodness)


def score(run: Mapping, metric: str, test: str | None = None) -> float:
  """Returns a run's metric on one test, or its mean over all of them."""
  tests = run['tests']
  chosen = [tests[test]] if test is not None else tests.values()
  return statistics.fmean(found[metric] for found in chosen)


def parts(study: Study, records: Sequence[Mapping], command: str) -> list:
  """Returns the report's parts.

  Args:
    study: as configured.
    records: of its programs that are done.
    command: that made them.
  """
  by_name = {(r['task'], r['architecture']): r for r in records}
  missing = len(study.tasks) * len(study.architectures) - len(by_name)
  found = [
    page.Text(
      f'{len(study.seeds)} seeds; learning rates {_list(study.learning_rates)}'
      f', weight decays {_list(study.weight_decays)}: a row shows the pair '
      f'with the best mean {study.metric} over seeds, with the '
      f'{LEVEL:.0%} interval of that mean (Student). The choice of the pair '
      'makes all rows a little too good.'
    ),
    page.Code(command),
    *[page.Text(line) for line in _machines(records)],
  ]
  if missing:
    found.append(page.Text(f'{missing} programs have not run yet.'))
  for task in study.tasks:
    rows = [
      by_name[task, a] for a in study.architectures if (task, a) in by_name
    ]
    if not rows:
      continue
    if task:
      found.append(page.Heading(page.Name(task)))
    found.append(_table(study, task, rows))
    found.append(_frontier(study, rows))
    found.append(_curves(study, rows))
  return found


def write(study: Study, records, command: str, out: pathlib.Path) -> None:
  """Writes report.html and report.md."""
  page.write(out, page.Name(study.title), parts(study, records, command))


def _machines(records) -> list[str]:
  """One line for every machine and day that records come from."""
  return sorted(
    {
      f'Measured on {m["date"]} on {m["cores"]} cores of {m["device"]}, python '
      f'{m["python"]}, '
      + ', '.join(f'{k} {v}' for k, v in m['versions'].items())
      for m in (record['machine'] for record in records)
    }
  )


def _list(numbers) -> str:
  return ', '.join(f'{x:g}' for x in numbers)


def _table(study, task, records) -> page.Table:
  tests = [name for name in study.tests if name]
  published = study.published.get(task, {})
  macro = 'macro_accuracy' in next(
    iter(records[0]['runs'][0]['tests'].values())
  )
  head = ['mixer', study.metric, '±', *map(page.Name, tests)]
  head += ['macro'] * macro + ['published', 'within band'] * bool(published)
  head += ['parameters', 'state bytes', 'training FLOPs', 'learning rate']
  head += ['weight decay', 'skipped steps', 'seconds']
  rows = []
  for record in records:
    name, runs = record['architecture'], best_runs(record, study.metric)
    mean, half = interval([score(run, study.metric) for run in runs])
    row = [page.Name(name), f'{mean:.3f}', f'{half:.3f}']
    for test in tests:
      row.append(
        f'{statistics.fmean(score(r, study.metric, test) for r in runs):.3f}'
      )
    if macro:
      values = [score(run, 'macro_accuracy') for run in runs]
      row.append(f'{statistics.fmean(values):.3f}')
    if published:
      value = published.get(name)
      row += (
        ['', '']
        if value is None
        else [
          f'{value:.3f}',
          'yes' if abs(value - mean) <= study.band else 'no',
        ]
      )
    sizes = record['sizes']
    row += [f'{sizes["params"]:,}', f'{sizes["state"]:,}']
    row += [f'{sizes["flops"]:.3g}', f'{runs[0]["learning_rate"]:g}']
    row += [f'{runs[0]["weight_decay"]:g}']
    row += [sum(run['skipped_steps'] for run in runs), record['seconds']]
    rows.append(row)
  kinds = {'yes': 'good', 'no': 'bad'}

  def kind(cell):
    return '' if isinstance(cell, page.Name) else kinds.get(cell, '')

  return page.Table(head, rows, kind)


def _frontier(study, records) -> page.Plot:
  made, axes = page.figure()
  families = {}  # one line for 'gla 16', 'gla 32', ...
  for record in records:
    runs = best_runs(record, study.metric)
    mean, half = interval([score(run, study.metric) for run in runs])
    family = re.sub(r'[ -]\d+$', '', record['architecture'])
    size = max(record['sizes']['state'], 1)
    families.setdefault(family, []).append((size, mean, half))
  entries = {}
  for i, (family, points) in enumerate(families.items()):
    sizes, means, halves = zip(*sorted(points), strict=True)
    entries[family] = axes.errorbar(
      sizes,
      means,
      None if any(map(math.isnan, halves)) else halves,
      marker=page.MARKERS[i % len(page.MARKERS)],
      color=page.COLORS[i % len(page.COLORS)],
      markerfacecolor='none',  # to see the one below, too
      linewidth=1,
      capsize=3,
    )
  axes.set_xscale('log', base=2)
  axes.set_xlabel('bytes of decode state')
  axes.set_ylabel(study.metric)
  page.legend(axes, entries)
  return page.Plot(made, f'{study.metric} against the size of the decode state')


def _curves(study, records) -> page.Plot:
  (made, axes), entries = page.figure(), {}
  for i, record in enumerate(records):
    color = page.COLORS[i % len(page.COLORS)]
    steps = record['config']['steps']
    for run in best_runs(record, study.metric):
      losses = run['losses']
      (entries[record['architecture']],) = axes.plot(
        [steps * (k + 0.5) / len(losses) for k in range(len(losses))],
        losses,
        color=color,
        linewidth=1,
      )
  axes.set_xlabel('step')
  axes.set_ylabel('training loss, nats')
  page.legend(axes, entries)
  return page.Plot(made, 'training loss of every seed')
