"""What a claim of a survey is, and how a measurement becomes a verdict.

A claim measures once and judges several statements by what it measured. The
verdict of a statement is computed from the figures, never written down.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

HOLDS = 'HOLDS'
RESTATED = 'HOLDS (restated)'
FAILS = 'DOES NOT HOLD'
UNDEFINED = 'NOT WELL DEFINED'
NOT_HERE = 'NOT MEASURED ON THIS DEVICE'
VERDICTS = (HOLDS, RESTATED, FAILS, UNDEFINED, NOT_HERE)

# Documents by the names used below.
SOURCES = {
  'AS': 'survey of efficient attention methods: hardware-efficient, sparse, '
  'compact and linear attention (2025)',
  'FL': 'Fournier et al., a practical survey on faster and lighter '
  'transformers (2103.14636)',
  'S001': 'seed guide 1: efficient attention',
  'S002': 'seed guide 2: attention mechanisms',
  'S003': 'seed guide 3: transformers and attention, with the master table',
  'FLR': 'read-me of the guide to faster and lighter transformers',
  'BLOG': 'page of the guide to efficient attention, with its drawings',
}

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
  """One thing a source says.

  Attributes:
    says: the claim in our words.
    source: document and page or table.
    printed: the value in the source, as printed; '' if there is none.
    measured: values -> what we found, shown beside it.
    judge: values -> one of VERDICTS.
    rule: what `judge` asks, in words, with the tolerance.
  """

  says: str
  source: str
  printed: str = ''
  measured: Callable[[Values], str]
  judge: Callable[[Values], str]
  rule: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """One row of the survey.

  Attributes:
    title: what it is about.
    tier: a (counting), b (minutes on a CPU) or c (an accelerator).
    measure: () -> values of plain numbers, strings and lists, stored as JSON.
    statements: judged by those values.
    parts: values -> further parts of the report: plots and tables.
  """

  title: str
  tier: str
  measure: Callable[[], Values]
  statements: tuple[Statement, ...]
  parts: Callable[[Values], list] = lambda values: []


def shown(number: float) -> str:
  """Returns four digits, or all of those before the point."""
  return f'{number:,.0f}' if abs(number) >= 1000 else f'{number:.4g}'


def equals(
  says: str,
  source: str,
  printed: str,
  key: str,
  value: float,
  *,
  tolerance: float = 0.03,
  unit: str = '',
  otherwise: str = FAILS,
) -> Statement:
  """A statement that holds if values[key] is `value`, to a relative part."""

  def judge(values):
    near = math.isclose(values[key], value, rel_tol=tolerance, abs_tol=1e-12)
    return HOLDS if near else otherwise

  return Statement(
    says=says,
    source=source,
    printed=printed,
    measured=lambda values: f'{shown(values[key])} {unit}'.strip(),
    judge=judge,
    rule=f'within {tolerance:.1%} of {shown(value)}',
  )


def within(
  says: str,
  source: str,
  printed: str,
  key: str,
  low: float,
  high: float,
  *,
  unit: str = '',
  verdict: str = HOLDS,
  otherwise: str = FAILS,
) -> Statement:
  """A statement that gets `verdict` if low <= values[key] <= high."""

  def judge(values):
    return verdict if low <= values[key] <= high else otherwise

  return Statement(
    says=says,
    source=source,
    printed=printed,
    measured=lambda values: f'{shown(values[key])} {unit}'.strip(),
    judge=judge,
    rule=f'between {shown(low)} and {shown(high)}',
  )


def elsewhere(says: str, source: str, printed: str, needs: str) -> Statement:
  """A statement that no run of this framework alone can measure."""
  return Statement(
    says=says,
    source=source,
    printed=printed,
    measured=lambda values: '',
    judge=lambda values: NOT_HERE,
    rule=needs,
  )
