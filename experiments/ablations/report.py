"""The tables and plots of a study, from its stored records."""

import collections
import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

from experiments import page
from experiments.ablations.study import Study

LEVEL = 0.95  # of the intervals
NAMES_OF_SIZES = {
  'params': 'parameters',
  'flops': 'training FLOPs',
  'state': 'state bytes',
}


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and the half width of its Student interval."""
  mean = statistics.fmean(values)
  if len(values) < 2:
    return mean, math.nan
  spread = statistics.stdev(values) / math.sqrt(len(values))
  return mean, spread * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)


def bounds(values: Sequence[float], metric: str) -> tuple[float, float, float]:
  """Returns the mean and the ends of its interval.

  That of an accuracy is cut at 0 and 1, which it cannot leave; NaN of one seed.
  """
  mean, half = interval(values)
  low, high = mean - half, mean + half
  if 'accuracy' in metric and not math.isnan(half):
    low, high = max(low, 0.0), min(high, 1.0)
  return mean, low, high


def at_edge(record: Mapping, metric: str) -> bool:
  """Tells whether the best learning rate is the first or last of the grid.

  The best may then be outside of it. A grid of one rate has only edges.
  """
  rates = {run['learning_rate'] for run in record['runs']}
  best = best_runs(record, metric)[0]['learning_rate']
  return best in (min(rates), max(rates))


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
      f'{_grid(records)}: a row shows the pair '
      f'with the best mean {study.metric} over seeds, with the '
      f'{LEVEL:.0%} interval of that mean (Student'
      + (', cut at 0 and 1' if 'accuracy' in study.metric else '')
      + '). The choice of the pair makes all rows a little too good.'
    ),
    page.Code(command),
    *[page.Text(line) for line in _machines(records)],
  ]
  if missing:
    found.append(page.Text(f'{missing} programs have not run yet.'))
  for name, tasks in study.groups.items():
    found += [page.Heading(page.Name(name)), _group(study, name, by_name)]
    found.append(page.Text(f'Mean over {len(tasks)} settings.', note=True))
  grouped = {task for tasks in study.groups.values() for task in tasks}
  for task in study.tasks:
    if task in grouped:
      continue
    rows = [
      by_name[task, a] for a in study.architectures if (task, a) in by_name
    ]
    if not rows:
      continue
    if task:
      found.append(page.Heading(page.Name(task)))
    found.append(_table(study, task, rows))
    if len(rows) > 1:
      found.append(page.Text(spreads(rows)))
    edges = [r for r in rows if at_edge(r, study.metric)]
    if edges:
      found.append(page.Text(_said_of(edges, len(rows)), note=True))
    if study.published.get(task):
      found.append(page.Text(f'Published: {study.source}.', note=True))
    states = {row['sizes']['state'] for row in rows}
    if 0 not in states and len(states) > 1:  # an encoder has none
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


def _grid(records) -> str:
  """Says what the records ran with."""

  def values(key):
    found = {run[key] for record in records for run in record['runs']}
    return ', '.join(f'{x:g}' for x in sorted(found))

  return (
    f'Seeds {values("seed")}; learning rates {values("learning_rate")}; weight '
    f'decays {values("weight_decay")}'
  )


def _group(study, name, by_name) -> page.Table:
  """Shows the mean over the tasks of a group, and each of them."""
  tasks, published = study.groups[name], study.published.get(name, {})
  head = ['mixer', study.metric, *_beside_head(study, published)]
  head += [page.Name(task.removeprefix(name).strip() or name) for task in tasks]
  rows = []
  for architecture in study.architectures:
    scores = [
      statistics.fmean(
        score(run, study.metric) for run in best_runs(record, study.metric)
      )
      if (record := by_name.get((task, architecture)))
      else None
      for task in tasks
    ]
    whole = None not in scores
    mean = statistics.fmean(scores) if whole else None
    row = [page.Name(architecture), f'{mean:.3f}' if whole else '']
    if published:
      row += _beside(study, published.get(architecture), mean)
    rows.append(row + ['' if s is None else f'{s:.3f}' for s in scores])
  return page.Table(head, rows, _kind)


def _beside_head(study, published) -> list[str]:
  if not published:
    return []
  return ['published'] + ['within band'] * bool(study.band)


def _beside(study, published, mean) -> list[str]:
  """The published value, and whether the measured mean is within the band."""
  if published is None:
    return [''] * len(_beside_head(study, True))
  row = [f'{published:.3f}']
  if study.band:
    near = mean is not None and abs(published - mean) <= study.band
    row.append('' if mean is None else 'yes' if near else 'no')
  return row


def _kind(cell) -> str:
  kinds = {'yes': 'good', 'no': 'bad', 'edge': 'open', 'not tuned': 'open'}
  return '' if isinstance(cell, page.Name) else kinds.get(cell, '')


def spreads(records: Sequence[Mapping]) -> str:
  """Says how far apart the sizes of the rows are, largest over smallest."""
  said = []
  for key, name in NAMES_OF_SIZES.items():
    sizes = [record['sizes'][key] for record in records]
    if min(sizes):
      said.append(f'{name} x{max(sizes) / min(sizes):.2f}')
  return f'Largest over smallest: {", ".join(said)}.'


def _said_of(edges, count) -> str:
  names = ', '.join(page.Name(record['architecture']) for record in edges)
  rates = {run['learning_rate'] for record in edges for run in record['runs']}
  if len(rates) == 1:
    return f'The learning rate of {len(edges)} of {count} rows is not tuned.'
  return (
    'The best learning rate is at an edge of the grid, so that a better one '
    f'may lie outside: {names}.'
  )


def _table(study, task, records) -> page.Table:
  tests = [name for name in study.tests if name]
  published = study.published.get(task, {})
  macro = study.metric != 'macro_accuracy' and 'macro_accuracy' in next(
    iter(records[0]['runs'][0]['tests'].values())
  )
  state = any(record['sizes']['state'] for record in records)
  first = records[0]['sizes']
  head = ['mixer', study.metric, f'{LEVEL:.0%} interval']
  head += [*map(page.Name, tests)]
  head += ['macro'] * macro + _beside_head(study, published)
  head += ['parameters', '% of first']
  head += ['state bytes', '% of first'] * state
  head += ['training FLOPs', '% of first', 'learning rate', 'edge']
  head += ['weight decay', 'skipped steps', 'seconds']
  rows = []
  for record in records:
    name, runs = record['architecture'], best_runs(record, study.metric)
    scores = [score(run, study.metric) for run in runs]
    mean, low, high = bounds(scores, study.metric)
    row = [page.Name(name), f'{mean:.3f}']
    row.append('one seed' if math.isnan(low) else f'{low:.3f} to {high:.3f}')
    for test in tests:
      row.append(
        f'{statistics.fmean(score(r, study.metric, test) for r in runs):.3f}'
      )
    if macro:
      values = [score(run, 'macro_accuracy') for run in runs]
      row.append(f'{statistics.fmean(values):.3f}')
    if published:
      row += _beside(study, published.get(name), mean)
    sizes = record['sizes']
    row += [f'{sizes["params"]:,}', _percent(sizes, first, 'params')]
    if state:
      row += [f'{sizes["state"]:,}', _percent(sizes, first, 'state')]
    row += [f'{sizes["flops"]:.3g}', _percent(sizes, first, 'flops')]
    row += [f'{runs[0]["learning_rate"]:g}']
    row += [_edge(record, study.metric)]
    row += [f'{runs[0]["weight_decay"]:g}']
    row += [sum(run['skipped_steps'] for run in runs), record['seconds']]
    rows.append(row)
  return page.Table(head, rows, _kind)


def _edge(record, metric) -> str:
  if len({run['learning_rate'] for run in record['runs']}) == 1:
    return 'not tuned'
  return 'edge' if at_edge(record, metric) else ''


def _percent(sizes, first, key) -> str:
  return f'{100 * sizes[key] / first[key]:.1f}'


def families(records: Sequence[Mapping]) -> dict[str, list[Mapping]]:
  """Returns the records by the name of the line that joins them.

  One line joins the sizes of one model, 'gla 16' and 'gla 32': the names are
  the same up to a last number, and so are the mixers of the models.
  """
  groups = collections.defaultdict(list)
  for record in records:
    stem = re.sub(r'[ -]\d+$', '', record['architecture'])
    model = record['config'].get('model', {})
    groups[stem, str(model.get('pattern'))].append(record)
  stems = collections.Counter(stem for stem, _ in groups)
  return {
    stem
    if len(group) > 1 and stems[stem] == 1
    else group[0]['architecture']: group
    for (stem, _), group in groups.items()
  }


def _frontier(study, records) -> page.Plot:
  made, axes = page.figure()
  entries = {}
  for i, (family, members) in enumerate(families(records).items()):
    points = []
    for record in members:
      runs = best_runs(record, study.metric)
      scores = [score(run, study.metric) for run in runs]
      points.append((record['sizes']['state'], *bounds(scores, study.metric)))
    sizes, means, lows, highs = map(list, zip(*sorted(points), strict=True))
    entries[family] = axes.errorbar(
      sizes,
      means,
      None
      if any(map(math.isnan, lows))
      else [
        [mean - low for mean, low in zip(means, lows, strict=True)],
        [high - mean for mean, high in zip(means, highs, strict=True)],
      ],
      **page.style(i),
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
    style = page.style(i) | dict(marker='')
    steps = record['config']['steps']
    for run in best_runs(record, study.metric):
      losses = run['losses']
      (entries[record['architecture']],) = axes.plot(
        [steps * (k + 0.5) / len(losses) for k in range(len(losses))],
        losses,
        **style,
        linewidth=1,
      )
  axes.set_xlabel('step')
  axes.set_ylabel('training loss, nats')
  page.legend(axes, entries)
  return page.Plot(made, 'training loss of every seed')
