"""What of the suite runs when: always, with --all, or in turn."""

import collections
import itertools
import zlib

import pytest


def combinations(*axes):
  """Parameters of every combination of the values of some axes.

  A few that contain every value run always; the others are part of the sweep
  of `--all`, of which `launch/test.sh --rotate` takes a part.
  """
  axes = [list(axis) for axis in axes]
  always = {
    tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))
  }
  return [
    pytest.param(
      *(axis[i] for axis, i in zip(axes, indices, strict=True)),
      marks=() if indices in always else pytest.mark.exhaustive,
    )
    for indices in itertools.product(*(range(len(axis)) for axis in axes))
  ]


# Where properties are tested of many rows, shapes and options. The first case
# of each and one in `OFTEN` of the others run always; the others take turns,
# one in `TURNS`, and so do all tests marked `in_turn`, long runs of what others
# test in parts.
IN_TURN = (
  'tests/data/batches_test',
  'tests/data/corruption_test',
  'tests/data/labelled_test',
  'tests/data/mixture_test',
  'tests/data/token_cache_test',
  'tests/decode/',
  'tests/experiments/mutations_test',
  'tests/experiments/rules_test',
  'tests/experiments/survey_test',
  'tests/interop/',
  'tests/kernels/',
  'tests/layers/',
  'tests/models/',
  'tests/ops/',
  'tests/train/fixtures_test',
  'tests/train/kinds_objectives_test',
  'tests/train/optimizer_test',
  'tests/train/parts_test',
  'tests/train/resume_test',
  'tests/train/step_test',
)
TURNS = 6
OFTEN = 6 * TURNS


def belongs(item, part):
  """Whether a test is in the part 'K/N' of all; a group is in one part."""
  index, count = map(int, part.split('/'))
  if not 0 <= index < count:
    raise pytest.UsageError(f'{part}: K/N needs 0 <= K < N')
  group = item.get_closest_marker('xdist_group')
  name = group.args[0] if group else item.nodeid
  return zlib.crc32(name.encode()) % count == index


def always(items):
  """The tests of `items` that do not take turns.

  All tests of a group have the same turn, and share what they compile.
  """
  seen = collections.Counter()
  kept = []
  for item in items:
    if any(map(item.get_closest_marker, ('exhaustive', 'in_turn', 'study'))):
      continue
    function, _, case = item.nodeid.partition('[')
    seen[function] += 1
    takes_turns = case and function.startswith(IN_TURN) and seen[function] > 1
    if not takes_turns or belongs(item, f'0/{OFTEN}'):
      kept.append(item)
  return kept


def choose(items, *, everything, part, share, turns):
  """Splits tests into (those that run, those that do not).

  Args:
    items: of pytest.
    everything: the whole sweep runs.
    part: 'K/N', of the sweep, and the turn K of the cases that take turns;
      without it none of the sweep runs.
    share: 'K/N', of the tests that run always; without it all of them run.
    turns: whether cases take turns; otherwise they all run.
  """
  kept, left = [], []
  first = set(map(id, always(items)))
  turn = None if part is None else f'{int(part.split("/")[0]) % TURNS}/{TURNS}'
  for item in items:
    if item.get_closest_marker('study'):
      runs = everything
    elif item.get_closest_marker('exhaustive'):
      runs = everything or (part is not None and belongs(item, part))
    elif id(item) not in first and turns:
      runs = everything or (turn is not None and belongs(item, turn))
    else:
      runs = share is None or belongs(item, share)
    (kept if runs else left).append(item)
  return kept, left
