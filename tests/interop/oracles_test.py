"""The table of outside code says what is compared, and nothing else."""

import ast
import importlib
import pathlib
import re

import pytest

from efficient_attn.layers.mixers import MIXERS
from tests.interop import oracles

FOLDER = pathlib.Path(__file__).parent
# Where the other half of the comparisons of a group is built.
BUILDERS = {
  'blocks': ('blocks', 'compact_blocks', 'state_space_blocks'),
  'low_rank_blocks': ('low_rank_blocks',),
  'pattern_blocks': ('pattern_blocks',),
  'routed_blocks': ('routed_blocks_test',),
  'fla_blocks': ('fla_blocks', 'fla_delta_blocks'),
  'fla_ops': ('fla_ops',),
  'library_blocks': ('library_blocks', 'memory_blocks', 'xlstm_blocks'),
  'transformer_blocks': ('transformer_blocks',),
}


def source(module):
  return (FOLDER / f'{module}.py').read_text()


def covered(group):
  """The entries that a test of the group's file names or is repeated for."""
  tree = ast.parse(source(f'{group}_test'))
  names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
  for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
    if ast.unparse(call.func) == 'pytest.mark.parametrize':
      if ast.unparse(call.args[1]) == f'oracles.{group.upper()}':
        return set(oracles.GROUPS[group])
  return {n for n in oracles.GROUPS[group] if f'test_{n}' in names}


@pytest.mark.parametrize('group', oracles.GROUPS)
def test_every_entry_has_a_test(group):
  assert covered(group) == set(oracles.GROUPS[group])


@pytest.mark.parametrize('group', oracles.GROUPS)
def test_every_entry_is_of_a_row_and_of_code_that_is_called(group):
  text = ''.join(source(module) for module in BUILDERS[group])
  for oracle in oracles.GROUPS[group].values():
    assert oracle.row in MIXERS and oracle.part in ('mixer', 'op')
    assert re.search(rf'\b{oracle.code}\b', text), oracle


# The comparisons of routed blocks are tests of their own.
@pytest.mark.parametrize('group', sorted({*BUILDERS} - {'routed_blocks'}))
def test_every_comparison_is_an_entry(group):
  for package in ('torch', 'transformers', 'fla')[: 3 if 'fla' in group else 2]:
    pytest.importorskip(package)
  built = set()
  for name in BUILDERS[group]:
    module = importlib.import_module(f'tests.interop.{name}')
    built |= set(module.CASES if group == 'fla_ops' else module.BLOCKS)
  assert built == set(oracles.GROUPS[group])


def test_packages():
  assert oracles.packages('mamba') == 'transformers'
  assert oracles.packages('nsa') == 'flash-linear-attention (op)'
  assert oracles.packages('mlstm') == 'xlstm'
  assert not oracles.packages('no row')
