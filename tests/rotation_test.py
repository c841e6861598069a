"""Every test of the sweep has its turn, and groups have it together."""

import types

import pytest

from tests.rotation import TURNS, always, belongs, choose, combinations


def item(name, **marks):
  found = {k: types.SimpleNamespace(args=(v,)) for k, v in marks.items()}
  return types.SimpleNamespace(nodeid=name, get_closest_marker=found.get)


ITEMS = [item(f'test_{i}', exhaustive=None) for i in range(50)]
ITEMS += [item(f'test_{i}') for i in range(50, 100)]


def test_parts_are_the_whole_sweep_once():
  runs = [
    choose(ITEMS, everything=False, part=f'{i}/4', share='0/1', turns=True)[0]
    for i in range(4)
  ]
  swept = [test.nodeid for part in runs for test in part[:-50]]
  assert sorted(swept) == sorted(test.nodeid for test in ITEMS[:50])
  assert min(len(part) for part in runs) > 50 + 5
  assert all(part[-50:] == ITEMS[50:] for part in runs)


def test_shares_are_the_rest_once():
  runs = [
    choose(ITEMS, everything=False, part=None, share=f'{i}/3', turns=True)[0]
    for i in range(3)
  ]
  assert sorted(t.nodeid for part in runs for t in part) == sorted(
    test.nodeid for test in ITEMS[50:]
  )


def test_by_default_all_but_the_sweep_run_and_with_all_everything():
  options = dict(part=None, share=None, turns=True)
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


CASES = [
  item(f'tests/ops/x_test.py::test_{p}[{i}]') for p in 'ab' for i in range(40)
]
CASES += [item(f'test_long_{i}', in_turn=None) for i in range(9)]
OTHERS = [item(f'tests/config_test.py::test_a[{i}]') for i in range(9)]
OTHERS += [item(f'tests/ops/x_test.py::test_{i}') for i in range(9)]


def test_cases_of_a_property_take_turns():
  tests = CASES + OTHERS
  kept = always(tests)
  assert kept[-len(OTHERS) :] == OTHERS and id(CASES[0]) in {*map(id, kept)}
  assert 3 < len(kept) - len(OTHERS) < 40
  options = dict(everything=False, share=None, turns=True)
  assert choose(tests, part=None, **options)[0] == kept
  runs = [choose(tests, part=f'{i}/12', **options)[0] for i in range(TURNS)]
  found = {test.nodeid for part in runs for test in part}
  assert found == {test.nodeid for test in tests}
  assert all({*map(id, kept)} <= {*map(id, part)} for part in runs)
  assert choose(tests, part=None, **options | dict(turns=False))[0] == tests


def test_whole_studies_run_with_all_alone():
  tests = [item('test_study', study=None)]
  options = dict(part='0/16', share=None, turns=True)
  assert choose(tests, everything=False, **options) == ([], tests)
  assert choose(tests, everything=True, **options) == (tests, [])
