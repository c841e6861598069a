"""The survey's report: verdicts, what was printed, what was measured."""

import collections
import pathlib
from collections.abc import Mapping

from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  RESTATED,
  SOURCES,
  UNDEFINED,
  VERDICTS,
  Claim,
)
from experiments.survey.run import verdicts
from experiments.survey.tables import tables

TITLE = 'What the surveys of efficient attention say, measured again'
KINDS = {
  HOLDS: 'good',
  RESTATED: 'other',
  FAILS: 'bad',
  UNDEFINED: 'open',
  NOT_HERE: 'open',
  'ERROR': 'bad',
}


def kind(cell: str) -> str:
  """The class of a verdict in the style sheet."""
  return KINDS.get(cell, '')


def summary(claims: Mapping[str, Claim], record: Mapping) -> page.Table:
  """Returns the statements of each claim by verdict."""
  columns = [*VERDICTS, 'ERROR']
  rows, total = [], collections.Counter()
  for name, claim in claims.items():
    counts = collections.Counter(verdicts(claim, record['claims'][name]))
    total += counts
    to = page.link(name, f'{name} {claim.title}')
    rows.append([to, claim.title, claim.tier, *(counts[c] for c in columns)])
  rows.append(['', 'all', '', *(total[c] for c in columns)])
  rows = [[cell or '' for cell in row] for row in rows]
  return page.Table(['', 'claim', 'tier', *columns], rows)


def parts(claims: Mapping[str, Claim], record: Mapping, command: str) -> list:
  """Returns the report's parts."""
  versions = ', '.join(f'{k} {v}' for k, v in record['versions'].items())
  found = [
    page.Text(
      f'Measured on {record["date"]} on {record["cores"]} cores of '
      f'{record["device"]}, python {record["python"]}, {versions}.'
    ),
    page.Code(command),
    page.Heading('Summary'),
    page.Text('Statements of each claim, by verdict.'),
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
        statement.printed,
        '' if verdict == NOT_HERE else statement.measured(measured['values']),
        statement.rule,
        statement.source,
      ]
      for statement, verdict in zip(
        claim.statements, verdicts(claim, measured), strict=True
      )
    ]
    head = ['statement', 'verdict', 'printed', 'measured', 'rule', 'source']
    found.append(page.Table(head, rows, kind=kind))
    if measured['values'] is not None:
      found += claim.parts(measured['values'])
    found.append(page.Text(f'{measured["seconds"]} s', note=True))
  found.append(page.Heading('The tables of the surveys'))
  every = record['claims'].items()
  found += tables({n: m['values'] for n, m in every if m.get('values')})
  found.append(page.Heading('Sources'))
  found.append(page.Table(['name', 'document'], list(SOURCES.items())))
  return found


def write(claims, record, command: str, out: pathlib.Path) -> None:
  """Writes report.html and report.md."""
  page.write(out, TITLE, parts(claims, record, command))
