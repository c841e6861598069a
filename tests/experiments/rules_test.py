"""Every rule can say both: that its statement holds, and that it does not."""

import json
import pathlib

import numpy as np
import pytest

from efficient_attn.ops.recurrent.forms import FORMS
from experiments.survey import run
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  OPEN,
  RESTATED,
  UNDEFINED,
)
from experiments.survey.claims import CLAIMS

STORED = pathlib.Path(run.__file__).parent / 'results' / 'results.json'
FAVOURABLE = {HOLDS, RESTATED, OPEN}
OTHERS = {FAILS, UNDEFINED}
# Factors of single figures: 1 / 200 to 200 in steps of 2 percent, and far off.
FACTORS = [
  0.0,
  -1.0,
  *np.geomspace(1e-15, 1e15, 31),
  *np.geomspace(1 / 200, 200, 536),
]


def leaves(values, path=()):
  """The places of numbers, and of words in place of numbers."""
  if isinstance(values, dict):
    for key, value in values.items():
      yield from leaves(value, (*path, key))
  elif isinstance(values, list):
    for i, value in enumerate(values):
      yield from leaves(value, (*path, i))
  elif not isinstance(values, bool | type(None)):
    yield path


class Read(dict):
  """Values that note which of their keys a rule reads."""

  def __init__(self, values, seen):
    super().__init__(values)
    self.seen = seen

  def __getitem__(self, key):
    self.seen.add(key)
    return super().__getitem__(key)

  def values(self):
    self.seen.update(self)
    return super().values()

  def items(self):
    self.seen.update(self)
    return super().items()


def changed(values, path, value):
  """Copies the values with another number at one place."""
  if not path:
    return value
  made = values.copy()
  made[path[0]] = changed(values[path[0]], path[1:], value)
  return made


def at(values, path):
  for key in path:
    values = values[key]
  return values


def verdict(statement, values):
  try:
    with np.errstate(all='ignore'):
      return statement.judge(values)
  except (ZeroDivisionError, ValueError, OverflowError):
    return None


NEW = (0, 1, 5, 8, 40, 100)


def perturbed(values, places):
  """Yields values with one number, one list or all that is read changed."""

  def scaled(made, group, factor):
    for path in group:
      x = at(values, path)
      made = changed(made, path, 0.0 if isinstance(x, str) else factor * x)
    return made

  for path in places:
    for factor in FACTORS:
      yield scaled(values, [path], factor)
    for new in NEW:
      yield changed(values, path, new)
  # What stands in one list, or under one key at every place, changes together.
  for depth in range(4):
    together = {}
    for path in places:
      together.setdefault(path[:depth], []).append(path)
      together.setdefault((depth, path[-1:]), []).append(path)
    for group in together.values():
      for factor in (0.0, 1e-3, 0.1, 0.5, 0.8, 0.95, 1.1, 1.3, 2, 10, 1e3):
        yield scaled(values, group, factor)
      for new in NEW:
        made = values
        for path in group:
          made = changed(made, path, new)
        yield made
  rng = np.random.default_rng(0)
  for _ in range(300):
    made = values
    for path in places:
      made = scaled(made, [path], 10 ** rng.normal(0, 1))
    yield made


def verdicts(statement, values):
  """The verdicts of a rule over perturbed values, until there are two."""
  seen, before = set(), None
  found = {verdict(statement, Read(values, seen))}
  while seen != before:  # a rule that says no early reads less
    before = set(seen)
    places = list(leaves({k: v for k, v in values.items() if k in seen}))
    for made in perturbed(values, places):
      if found & FAVOURABLE and found & OTHERS:
        return found
      found.add(verdict(statement, Read(made, seen)))
  return found


# Figures with which a statement gets the other verdict, where no change of one
# figure or of a few together gives it.
BY_HAND = {
  'RMSNorm is 10 to 15 percent faster than LayerNorm': lambda v: (
    v | dict(norms={name: [1.12] * 3 for name in v['norms']})
  ),
  'All methods of linear attention have all three forms': lambda v: (
    v | dict(forms={name: dict.fromkeys(FORMS, 0.0) for name in v['forms']})
  ),
}


@pytest.fixture(scope='module')
def stored():
  return json.loads(STORED.read_text())['claims']


@pytest.mark.parametrize('name', CLAIMS)
def test_every_rule_can_say_both(name, stored):
  values = stored[name]['values']
  if values is None:
    pytest.skip('wants an accelerator')
  for statement in CLAIMS[name].statements:
    if statement.judge(values) == NOT_HERE:
      continue
    found = verdicts(statement, values)
    if statement.says in BY_HAND:
      found.add(statement.judge(BY_HAND[statement.says](values)))
    assert found & FAVOURABLE and found & OTHERS, (statement.says, found)
