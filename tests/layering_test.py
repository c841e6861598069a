"""Imports flow one way, files stay small, nothing is called utils."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'efficient_attn'
FILES = sorted(PACKAGE.rglob('*.py'))
MODELS = {
  'values',
  'formats',
  'config',
  'quick_compile',
  'sharding',
  'ops',
  'layers',
  'models',
}

# Part of the package -> the parts that it may import, besides itself.
MAY_IMPORT = {
  'values': set(),
  'formats': set(),
  'model_config': {'values'},
  'config': {'values', 'model_config'},
  'config_files': {'config', 'values', 'formats'},
  'quick_compile': set(),
  'sharding': {'config', 'values'},
  'cli': {'config', 'config_files'},
  'data': {'values', 'config'},
  'kernels': set(),
  'ops': {'values', 'kernels'},
  'layers': {'values', 'formats', 'config', 'sharding', 'ops'},
  'models': MODELS,
  'decode': MODELS,
  'train': MODELS | {'config_files', 'data', 'decode', 'interop'},
  'compress': MODELS,
  'interop': MODELS,
}
OUTSIDE = {'launch', 'experiments', 'configs', 'tests'}
NO_FLAX = {'flax', 'ml_collections'}
FORBIDDEN = {'ops': NO_FLAX, 'kernels': NO_FLAX}


def imports(file):
  """Yields ('efficient_attn', 'ops', ...), also of imports in functions."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (tuple(name.name.split('.')) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file}:{node.lineno}: a relative import'
      base = node.module.split('.')
      yield from ((*base, name.name) for name in node.names)


@pytest.mark.parametrize(
  'file', FILES, ids=lambda f: str(f.relative_to(PACKAGE))
)
def test_file(file):
  part = file.relative_to(PACKAGE).parts[0].removesuffix('.py')
  found = set(imports(file))
  ours = {path[1] for path in found if path[0] == 'efficient_attn'} - {part}
  others = {path[0] for path in found} - {'efficient_attn'}
  assert ours <= (MAY_IMPORT[part] if part != '__init__' else set())
  assert not others & (OUTSIDE | FORBIDDEN.get(part, set()))
  if part == 'cli':
    assert others <= {'jax', *sys.stdlib_module_names}
  assert file.stem not in ('utils', 'util', 'common', 'helpers', 'misc')
  assert len(file.read_text().splitlines()) <= 400


def test_every_folder_is_a_package():
  for folder in {file.parent for file in FILES}:
    assert (folder / '__init__.py').exists(), folder
    assert folder.name not in ('utils', 'common')
