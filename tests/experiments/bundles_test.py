"""A kernel's cycles are its bundles, each as often as it runs."""

import os

import pytest

from experiments.benchmarks import bundles
from experiments.benchmarks.grids import Grid

# A grid of 8 programs; a program skips 4 bundles unless a condition holds, and
# has a loop of 3 turns around one whose number of turns is not known.
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s1 = sadd.s32 1, %s3 /* iteration index */ } /* Start region 9 */
   0x2   : > { %5 = sbr.rel (%p1_p0) target = $region8 }
   0x3   : > { %6 = sbr.rel (%p2_p1) target = $region2 }
   0x4   : > { %7 = vst %v1
 over two lines }
   0x5   : > { %7 = vst %v1 }
   0x6   : > { %7 = vst %v1 }
   0x7   : > { %7 = vst %v1 }
   0x8 PF: > { %s4_s2 = smov 0 } /* Start/End empty region 2 */
   0x9 LB: >> { %s5_s3 = sadd.s32 2, %s6 } /* Start region 3 :: Start region 4 */
   0xa LB: >>> { %s7_s4 = sadd.s32 1, %s8 } /* Start region 5 */
   0xb   : >>> { %p3_p2 = scmp.ge.s32.totalorder %s7_s4, %s9_s5 }
   0xc   : >>> { %8 = sbr.rel (!%p3_p2) target = $region5 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   :  {} /* End region 5 */
  0x11   : >> { %p4_p3 = scmp.ge.s32.totalorder %s5_s3, 5 }
  0x12   : >> { %9 = sbr.rel (!%p4_p3) target = $region4 }
  0x13   :  {}
  0x14   :  {}
  0x15   :  {}
  0x16   :  {}
  0x17 PF: > { %p5_p4 = scmp.ge.s32.totalorder %s2_s1, 10 } /* Start region 8 */
  0x18   : > { %10 = sbr.rel (!%p5_p4) target = $region9 }
  0x19   :  {}
  0x1a   :  {}
  0x1b   :  {}
  0x1c   :  {}
  0x1d   :  { %11 = vsyncpa }
"""  # noqa: E501
COUNT, OUTSIDE, GRID, CONDITION, OUTER, INNER = 30, 2, 28, 4, 14, 7


@pytest.fixture
def folder(tmp_path):
  own = tmp_path / str(os.getpid())
  own.mkdir()
  # Where a vector is stored the unit of stores is busy; one store is a spill.
  rows = ['MXU, VSTORE, VSTORE:SPILL', '4 1 1', '== UTILIZATION:']
  rows += ['0 1 1'] + ['1 0 0'] * COUNT
  for kind, text in (
    ('02-final_bundles', BUNDLES),
    ('01-final_hlo-static-per-bundle-utilization', '\n'.join(rows)),
    (
      '00-pre-finalize-registers-and-allocations',
      '#a1 [space=vmem, size = 0x100, scoped]\n#a2 [space=smem, size = 0x9]\n'
      '#a3 [space=vmem, size = 0x10, scoped]\n',
    ),
  ):
    (own / f'17-gate.1-{kind}.txt').write_text(text)
  return str(tmp_path)


GATE = Grid(8, 0, (5.0,))


def test_bundles_count_as_often_as_they_run(folder):
  once = OUTSIDE + 8 * (GRID - CONDITION - OUTER)
  held = 8 * CONDITION
  loops = 8 * 3 * (OUTER - INNER) + 8 * 3 * 5 * INNER
  found = bundles.read_kernel(folder, 'gate.1', GATE)
  assert found.cycles == once + held + loops
  assert found.spills == 1 and found.vmem == 0x110
  assert found.busy['VSTORE'] == 1 / found.cycles
  assert found.busy['MXU'] == (found.cycles - 1) / found.cycles / 4
  found = bundles.read_kernel(folder, 'gate.1', GATE, (0.25,))
  assert found.cycles == once + held / 4 + loops


@pytest.mark.parametrize('loops', [(), (None,), (1.0, 1.0)])
def test_schedule_and_grid_have_the_same_loops(folder, loops):
  with pytest.raises(ValueError, match="'gate.1'.* 1 loops of unknown turns"):
    bundles.read_kernel(folder, 'gate.1', GATE._replace(loops=loops))


def test_conditions_that_are_not_there_are_refused(folder):
  with pytest.raises(ValueError, match="'gate.1' has 1 conditions, not 2"):
    bundles.read_kernel(folder, 'gate.1', GATE, (1.0, 1.0))


def test_the_grid_is_that_of_the_schedule(folder):
  with pytest.raises(ValueError, match='10 turns cannot be 7 programs'):
    bundles.read_kernel(folder, 'gate.1', GATE._replace(programs=7))


def test_equal_kernels_share_a_dump(folder):
  found = bundles.read_kernel(folder, 'gate.7', GATE)
  assert found == bundles.read_kernel(folder, 'gate.1', GATE)
  with pytest.raises(FileNotFoundError, match='ate'):
    bundles.read_kernel(folder, 'ate', GATE)


def test_the_condition_of_the_grid_may_hold_little_but_a_loop():
  region = bundles.Region
  found = [
    region(0, 1000, 10, 'grid'),
    region(10, 990, None, 'condition'),
    region(20, 980, 4, 'loop'),
    region(25, 300, None, 'condition'),
    region(300, 970, None, 'condition'),
    region(981, 985, None, 'condition'),
  ]
  assert bundles._largest(1000, found, 2) == found[3:5]
