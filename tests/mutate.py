"""Changes the code a little, many times, and says what no test notices.

  python tests/mutate.py [--seed=0] [--count=20] [efficient_attn/train ...]

A mutant is one changed operator, number or condition, or one statement left
out, in a copy of the repository; the tests of its folder that import its file,
the nearest first, run until one fails. A survivor is code whose result no test
looks at, a test that is missing, or a change without an effect. Each mutant is
a process of its own: JAX does not survive the forks of the usual tools.
"""

import argparse
import ast
import collections
import contextlib
import copy
import functools
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = (
  'efficient_attn/train',
  'efficient_attn/decode',
  'efficient_attn/ops',
  'experiments/ablations',
)
SWAPS = {
  ast.Lt: ast.LtE,
  ast.LtE: ast.Lt,
  ast.Gt: ast.GtE,
  ast.GtE: ast.Gt,
  ast.Eq: ast.NotEq,
  ast.NotEq: ast.Eq,
  ast.Is: ast.IsNot,
  ast.IsNot: ast.Is,
  ast.In: ast.NotIn,
  ast.NotIn: ast.In,
  ast.Add: ast.Sub,
  ast.Sub: ast.Add,
  ast.Mult: ast.Div,
  ast.Div: ast.Mult,
  ast.FloorDiv: ast.Mult,
  ast.Mod: ast.FloorDiv,
  ast.Pow: ast.Mult,
  ast.And: ast.Or,
  ast.Or: ast.And,
}


def changed(node):
  """Yields what may take the place of a node."""
  new = copy.deepcopy(node)
  if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
    if type(node.op) in SWAPS:
      new.op = SWAPS[type(node.op)]()
      yield new
  elif isinstance(node, ast.Compare):
    new.ops[0] = SWAPS[type(node.ops[0])]()
    yield new
  elif isinstance(node, ast.UnaryOp):
    yield new.operand
  elif isinstance(node, ast.IfExp):
    new.body, new.orelse = new.orelse, new.body
    yield new
  elif isinstance(node, ast.Constant):
    if isinstance(node.value, bool):
      new.value = not node.value
      yield new
    elif isinstance(node.value, int | float):
      new.value = node.value + 1
      yield new
  elif isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
    yield ast.Pass()


def mutants(parent):
  """Yields (node, what takes its place, the function that puts it there)."""
  for field, value in ast.iter_fields(parent):
    # Nothing depends on annotations, decorators and messages.
    if field in ('annotation', 'returns', 'decorator_list'):
      continue
    several = isinstance(value, list)
    for i, node in enumerate(value if several else [value]):
      if not isinstance(node, ast.AST) or isinstance(node, ast.Raise):
        continue
      if several:
        put = functools.partial(value.__setitem__, i)
      else:
        put = functools.partial(setattr, parent, field)
      yield from ((node, new, put) for new in changed(node))
      if not isinstance(node, ast.JoinedStr):
        yield from mutants(node)


def name_of(file):
  """The module of a file below ROOT."""
  parts = file.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported(file):
  """Yields the names that a file imports, 'a.b' and 'a.b.c' of `a.b.c`."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@functools.cache
def tests_of(file, most=4):
  """The nearest tests, by imports, in the folder of a file's tests."""
  importers = collections.defaultdict(list)
  for folder in ('efficient_attn', 'experiments', 'launch', 'tests'):
    for other in (ROOT / folder).rglob('*.py'):
      for name in imported(other):
        importers[name].append(other)
  package, part, *_ = file.relative_to(ROOT).parts
  folder = ROOT / 'tests' / (part if package == 'efficient_attn' else package)
  names = file.stem, file.parent.name
  found, seen, near = [], {file}, [file]
  while near:
    near = {other for f in near for other in importers[name_of(f)]} - seen
    # Of the same distance, those that are called like the file.
    near = sorted(near, key=lambda f: (not any(n in f.stem for n in names), f))
    seen.update(near)
    found += [f for f in near if f.is_relative_to(folder)]
  tests = [f for f in found if f.stem.endswith('_test')]
  return tuple(str(f.relative_to(ROOT)) for f in tests[:most])


def run(folder, tests, timeout=None):
  """Whether the tests pass in a copy of the repository."""
  command = [sys.executable, '-m', 'pytest', '-x', '-q', '-n', '0', *tests]
  with contextlib.suppress(subprocess.TimeoutExpired):
    done = subprocess.run(
      command,
      cwd=folder,
      env=os.environ | {'PYTHONPATH': str(folder)},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      timeout=timeout,
    )
    return done.returncode == 0
  return False


@functools.cache
def seconds(folder, tests):
  """How long the tests take when nothing is changed."""
  started = time.monotonic()
  if not run(folder, tests):
    sys.exit(f'the tests fail before anything is changed: {" ".join(tests)}')
  return time.monotonic() - started


def main():
  """Tries a sample of the mutants of some files and lists the survivors."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('paths', nargs='*', default=FOLDERS)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--count', type=int, default=20, help='of each path')
  args = parser.parse_args()
  chosen = []
  for path in map(ROOT.joinpath, args.paths):
    candidates = []
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      tree = ast.parse(file.read_text())
      candidates += [(file, tree, *mutant) for mutant in mutants(tree)]
    count = min(args.count, len(candidates))
    chosen += random.Random(args.seed).sample(candidates, count)
  survivors = 0
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    unwanted = shutil.ignore_patterns('.git', '.venv*', '.*_cache', 'runs')
    shutil.copytree(ROOT, folder, ignore=unwanted, dirs_exist_ok=True)
    for file, tree, node, new, put in chosen:
      tests = tests_of(file)
      limit = 60 + 3 * seconds(folder, tests) if tests else 0
      put(new)
      code = ast.unparse(ast.fix_missing_locations(tree))
      put(node)
      mutated = folder / file.relative_to(ROOT)
      mutated.write_text(code)
      survives = not tests or run(folder, tests, limit)
      shutil.copy(file, mutated)
      survivors += survives
      print(
        f'{"SURVIVES" if survives else "killed"} '
        f'{file.relative_to(ROOT)}:{node.lineno}: '
        f'{ast.unparse(node)}  ->  {ast.unparse(new)}',
        flush=True,
      )
  print(f'{survivors} of {len(chosen)} survive: --seed={args.seed}')


if __name__ == '__main__':
  main()
