"""What of the suite runs when: always, with --all, or in turn."""

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


def belongs(item, part):
  """Whether a test is in the part 'K/N' of all; a group is in one part."""
  index, count = map(int, part.split('/'))
  if not 0 <= index < count:
    raise pytest.UsageError(f'{part}: K/N needs 0 <= K < N')
  group = item.get_closest_marker('xdist_group')
  name = group.args[0] if group else item.nodeid
  return zlib.crc32(name.encode()) % count == index


def choose(items, *, everything, part, share):
  """Splits tests into (those that run, those that do not).

  Args:
    items: of pytest.
    everything: the whole sweep runs.
    part: 'K/N', of the sweep; without it none of the sweep runs.
    share: 'K/N', of the tests outside the sweep; without it all of them run.
  """
  kept, left = [], []
  for item in items:
    if item.get_closest_marker('exhaustive'):
      runs = everything or (part is not None and belongs(item, part))
    else:
      runs = share is None or belongs(item, share)
    (kept if runs else left).append(item)
  return kept, left
