"""The survey's report: verdicts, what was printed, what was measured."""

import collections
import pathlib
from collections.abc import Mapping

from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  OPEN,
  PROVENANCES,
  RESTATED,
  UNDEFINED,
  UNTESTED,
  VERDICTS,
  Claim,
  Statement,
)
from experiments.survey.run import outdated, verdicts
from experiments.survey.sources import SOURCES
from experiments.survey.tables import tables

TITLE = 'What the surveys of efficient attention say, measured again'
KINDS = {
  HOLDS: 'good',
  RESTATED: 'other',
  FAILS: 'bad',
  OPEN: 'open',
  UNDEFINED: 'open',
  NOT_HERE: 'open',
  'ERROR': 'bad',
}


def kind(cell: str) -> str:
  """The class of a verdict in the style sheet."""
  return KINDS.get(cell, '')


def judged(claim: Claim, found: Mapping) -> list[tuple[Statement, str, str]]:
  """Returns the statements of a claim, their verdicts and provenances."""
  return [
    (s, verdict, UNTESTED if verdict in (NOT_HERE, 'ERROR') else s.provenance)
    for s, verdict in zip(claim.statements, verdicts(claim, found), strict=True)
  ]


def summary(claims: Mapping[str, Claim], record: Mapping) -> page.Table:
  """Counts the statements of sources by claim, by provenance, and our own."""
  columns = [*VERDICTS, 'ERROR']
  rows = []
  groups = {'all that sources say': collections.Counter()}
  groups |= {name: collections.Counter() for name in PROVENANCES}
  groups["this framework's own statements"] = collections.Counter()
  everything, *_, own = groups.values()
  for name, claim in claims.items():
    counts = collections.Counter()
    for statement, verdict, provenance in judged(claim, record['claims'][name]):
      if statement.ours:
        own[verdict] += 1
      else:
        for group in (counts, everything, groups[provenance]):
          group[verdict] += 1
    to = page.link(name, f'{name} {claim.title}')
    rows.append([to, claim.title, claim.tier, *(counts[c] for c in columns)])
  for name, counts in groups.items():
    rows.append(['', name, '', *(counts[c] for c in columns)])
  rows = [[cell or '' for cell in row] for row in rows]
  return page.Table(['', 'claim', 'tier', *columns], rows)


def _when(claims: Mapping[str, Claim], record: Mapping) -> str:
  """Says from when to when it was measured, where, and what is outdated."""
  found = [record['claims'][name] for name in claims]
  dates = sorted({row['date'] for row in found})
  devices = sorted(
    {f'{row["cores"]} cores of {row["device"]}' for row in found}
  )
  old = [n for n, c in claims.items() if outdated(c, record['claims'][n])]
  text = (
    f'Measured from {dates[0]} to {dates[-1]} on {" and ".join(devices)}; '
    'below every claim stand its date, commit, versions and seeds. '
    f'`pip install -c {record["constraints"]}` reproduces the versions.'
  )
  if old:
    text += f' By code that has changed since: {", ".join(old)}.'
  return text


def _made(claim: Claim, found: Mapping) -> str:
  """Says what a claim was measured with."""
  versions = ', '.join(f'{k} {v}' for k, v in found['versions'].items())
  seeds = ', '.join(map(str, found['seeds']))
  text = (
    f'{found["seconds"]} s on {found["date"]}, {found["cores"]} cores of '
    f'{found["device"]}, commit {found["commit"] or "unknown"}, code '
    f'{found["code"] or "unknown"}, python {found["python"]}, {versions}'
    + (seeds and f', seeds {seeds}')
  )
  return text + '. OUTDATED: the code has changed.' * outdated(claim, found)


def parts(claims: Mapping[str, Claim], record: Mapping, command: str) -> list:
  """Returns the report's parts."""
  found = [
    page.Text(_when(claims, record)),
    page.Code(command),
    page.Heading('Summary'),
    page.Text(
      'What the sources say, by claim and verdict; then all of it by where the '
      'figures come from: '
      + '; '.join(f'{name}: {what}' for name, what in PROVENANCES.items())
      + ". This framework's own statements, corrections among them, are "
      'counted apart. A rule and its limits are ours unless the printed value '
      'gives them.'
    ),
    summary(claims, record),
  ]
  for name, claim in claims.items():
    measured = record['claims'][name]
    found.append(page.Heading(f'{name} {claim.title}'))
    if 'error' in measured:
      found.append(page.Code(measured['error']))
      continue
    rows = [
      [
        statement.says,
        verdict,
        provenance,
        statement.printed,
        '' if verdict == NOT_HERE else statement.measured(measured['values']),
        statement.rule,
        statement.source,
      ]
      for statement, verdict, provenance in judged(claim, measured)
    ]
    head = [
      'statement',
      'verdict',
      'provenance',
      'printed',
      'found',
      'rule',
      'source',
    ]
    found.append(page.Table(head, rows, kind=kind))
    if measured['values'] is not None:
      found += claim.parts(measured['values'])
    found.append(page.Text(_made(claim, measured), note=True))
  found.append(page.Heading('The tables of the surveys'))
  every = record['claims'].items()
  found += tables({n: m['values'] for n, m in every if m.get('values')})
  found.append(page.Heading('Sources'))
  rows = [[n, s.authors, s.title, s.link] for n, s in SOURCES.items()]
  found.append(page.Table(['name', 'authors', 'document', 'link'], rows))
  return found


def write(claims, record, command: str, out: pathlib.Path) -> None:
  """Writes report.html and report.md."""
  page.write(out, TITLE, parts(claims, record, command))
