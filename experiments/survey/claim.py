"""What a claim of a survey is, and how a measurement becomes a verdict.

A claim measures once and judges several statements by what it measured. The
verdict of a statement is computed from the figures, never written down.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import getitem
from typing import Any

from experiments.survey.sources import OURS

HOLDS = 'HOLDS'
RESTATED = 'HOLDS (restated)'
FAILS = 'DOES NOT HOLD'
OPEN = 'NOT CONTRADICTED'  # a bound that the printed figure does not exceed
UNDEFINED = 'NOT WELL DEFINED'
NOT_HERE = 'NOT MEASURED ON THIS DEVICE'
VERDICTS = (HOLDS, RESTATED, FAILS, OPEN, UNDEFINED, NOT_HERE)

# Where the figures come from that a verdict is computed from.
MEASURED = 'measured'
DERIVED = 'derived'
UNTESTED = 'not tested'
PROVENANCES = {
  MEASURED: 'run or counted on the ops, layers and models of this framework',
  DERIVED: 'computed without them, from printed numbers and printed formulas',
  UNTESTED: 'no run of this framework on this device decides it',
}

Values = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statement:
  """One thing a source says.

  Attributes:
    says: the claim in our words.
    source: citation, see `sources`.
    printed: the value in the source, as printed; '' if there is none.
    measured: values -> what we found, shown beside it.
    judge: values -> one of VERDICTS.
    rule: what `judge` asks, in words, with the tolerance.
    provenance: of the figures that `judge` reads, one of PROVENANCES.
  """

  says: str
  source: str
  printed: str = ''
  measured: Callable[[Values], str]
  judge: Callable[[Values], str]
  rule: str
  provenance: str = MEASURED

  @property
  def ours(self) -> bool:
    """Whether no source says it: a correction, or a check of this framework."""
    return self.source.startswith(OURS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """One row of the survey.

  Attributes:
    title: what it is about.
    tier: a (counting), b (minutes on a CPU) or c (an accelerator).
    measure: () -> values of plain numbers, strings and lists, stored as JSON.
    statements: judged by those values.
    seeds: of what `measure` draws.
    parts: values -> further parts of the report: plots and tables.
  """

  title: str
  tier: str
  measure: Callable[[], Values]
  statements: tuple[Statement, ...]
  seeds: Sequence[int] = ()
  parts: Callable[[Values], list] = lambda values: []


def holds(condition: bool, restated: bool = False) -> str:
  """The verdict of a statement that holds, or holds in weaker words."""
  return HOLDS if condition else RESTATED if restated else FAILS


def less(*path: str, than: float) -> Callable[[Values], str]:
  """The rule that the figure at a path of keys is less than a number."""

  def judge(values):
    return holds(functools.reduce(getitem, path, values) < than)

  return judge


def more(*path: str, than: float) -> Callable[[Values], str]:
  """The rule that the figure at a path of keys is more than a number."""

  def judge(values):
    return holds(functools.reduce(getitem, path, values) > than)

  return judge


def statement(
  says: str,
  source: str,
  printed: str = '',
  *,
  rule: str,
  provenance: str = MEASURED,
) -> Callable[[Callable[[Values], tuple[str, str]]], Statement]:
  """Makes a statement of the function below it.

  The function computes from the values the verdict, and what is shown beside.
  """

  def made(function):
    return Statement(
      says=says,
      source=source,
      printed=printed,
      measured=lambda values: function(values)[1],
      judge=lambda values: function(values)[0],
      rule=rule,
      provenance=provenance,
    )

  return made


def listed(form: str, *columns: Iterable, by: str = ', ') -> str:
  """Joins the rows of columns, each as a format has it."""
  return by.join(form.format(*row) for row in zip(*columns, strict=True))


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
  provenance: str = MEASURED,
) -> Statement:
  """A statement that holds if values[key] is `value`, to a relative part."""

  @statement(
    says,
    source,
    printed,
    rule=f'within {tolerance:.1%} of {shown(value)}',
    provenance=provenance,
  )
  def figure_is_near(values):
    near = math.isclose(values[key], value, rel_tol=tolerance, abs_tol=1e-12)
    text = f'{shown(values[key])} {unit}'.strip()
    return HOLDS if near else otherwise, text

  return figure_is_near


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
  reason: str = '',
  provenance: str = MEASURED,
) -> Statement:
  """A statement that gets `verdict` if low <= values[key] <= high.

  `reason` says why these limits.
  """

  @statement(
    says,
    source,
    printed,
    rule=f'between {shown(low)} and {shown(high)}' + (reason and f': {reason}'),
    provenance=provenance,
  )
  def figure_is_inside(values):
    text = f'{shown(values[key])} {unit}'.strip()
    return verdict if low <= values[key] <= high else otherwise, text

  return figure_is_inside


def elsewhere(says: str, source: str, printed: str, needs: str) -> Statement:
  """A statement that no run of this framework alone can measure."""

  @statement(says, source, printed, rule=needs, provenance=UNTESTED)
  def not_here(values):
    return NOT_HERE, ''

  return not_here
