"""Every test of the sweep has its turn, and groups have it together."""

import types

import pytest

from tests.rotation import belongs, choose, combinations


def item(name, **marks):
  found = {k: types.SimpleNamespace(args=(v,)) for k, v in marks.items()}
  return types.SimpleNamespace(nodeid=name, get_closest_marker=found.get)


ITEMS = [item(f'test_{i}', exhaustive=None) for i in range(50)]
ITEMS += [item(f'test_{i}') for i in range(50, 100)]


def test_parts_are_the_whole_sweep_once():
  runs = [
    choose(ITEMS, everything=False, part=f'{i}/4', share='0/1')[0]
    for i in range(4)
  ]
  swept = [test.nodeid for part in runs for test in part[:-50]]
  assert sorted(swept) == sorted(test.nodeid for test in ITEMS[:50])
  assert min(len(part) for part in runs) > 50 + 5
  assert all(part[-50:] == ITEMS[50:] for part in runs)


def test_shares_are_the_rest_once():
  runs = [
    choose(ITEMS, everything=False, part=None, share=f'{i}/3')[0]
    for i in range(3)
  ]
  assert sorted(t.nodeid for part in runs for t in part) == sorted(
    test.nodeid for test in ITEMS[50:]
  )


def test_by_default_all_but_the_sweep_run_and_with_all_everything():
  options = dict(part=None, share=None)
  assert choose(ITEMS, everything=False, **options) == (ITEMS[50:], ITEMS[:50])
  assert choose(ITEMS, everything=True, **options) == (ITEMS, [])


def test_a_group_shares_compiled_programs():
  group = [item(f'test_{i}', xdist_group='row') for i in range(30)]
  assert len({belongs(test, '3/7') for test in group}) == 1


@pytest.mark.parametrize('part', ['4/4', '-1/4'])
def test_parts_are_counted_from_zero(part):
  with pytest.raises(pytest.UsageError, match='0 <= K < N'):
    belongs(ITEMS[0], part)


def test_combinations_always_cover_every_value():
  found = combinations('abc', (1, 2), (None,))
  assert len(found) == 6
  always = [param.values for param in found if not param.marks]
  assert [set(axis) for axis in zip(*always, strict=True)] == [
    set('abc'),
    {1, 2},
    {None},
  ]
  assert len(always) == 3
