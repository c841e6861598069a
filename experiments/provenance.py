"""What made a figure: a commit, installed packages, and a hash of the code."""

import ast
import functools
import hashlib
import importlib.metadata
import pathlib
import re
import subprocess
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]


def commit() -> str:
  """Returns the commit, with a `+` if code differs from it; '' outside git."""

  def git(*words):
    found = subprocess.run(
      ['git', '-C', str(ROOT), *words], capture_output=True, text=True
    )
    return found.stdout.strip() if not found.returncode else ''

  head = git('rev-parse', '--short=12', 'HEAD')
  code = ('efficient_attn/*.py', 'experiments/*.py', 'configs/*.py')
  return head and head + '+' * bool(git('status', '--porcelain', '--', *code))


def constraints(package: str = 'efficient_attn') -> str:
  """Returns the versions of all that a package needs, as pip constraints."""
  found, todo = {}, [package]
  while todo:
    name = re.sub('[-_.]+', '-', todo.pop()).lower()
    if name in found:
      continue
    try:
      made = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # of another platform
    found[name] = made.version.partition('+')[0]
    todo += [
      re.match(r'[\w.-]+', needed)[0]
      for needed in made.requires or ()
      if 'extra ==' not in needed
    ]
  del found[package.replace('_', '-')]
  return ''.join(f'{name}=={found[name]}\n' for name in sorted(found))


def fingerprint(function: Callable) -> str:
  """Hashes the code that a function of `experiments` reaches by name.

  Of `experiments` that is the function, and the functions, classes and
  constants that it names, in whatever module; of `efficient_attn` every module
  that these import from, and the modules that those import from. Comments,
  docstrings and layout do not count, and what a string names is not followed.
  """
  start = function.__module__, function.__qualname__.partition('.')[0]
  seen, todo, hashes = set(), [start], []
  while todo:
    place = module, name = todo.pop()
    if place in seen:
      continue
    seen.add(place)
    found = _resolved(module, name)
    if found != place:
      todo += [found] * (found is not None)
    elif name in _definitions(module):
      hashes.append(_hash(module, name))
      todo += _named(module, name)
  return hashlib.sha256(''.join(sorted(hashes)).encode()).hexdigest()[:16]


WHOLE = ''  # the name of a module as a whole


def _resolved(module: str, name: str) -> tuple[str, str] | None:
  """Returns where a name is defined; None outside of this repository."""
  if not module.startswith(('experiments', 'efficient_attn')):
    return None
  if name == WHOLE or name in _definitions(module):
    if module.startswith('efficient_attn'):
      return module, WHOLE
    return module, name
  if name in _imports(module):
    return _imports(module)[name]
  submodule = f'{module}.{name}'
  return (submodule, WHOLE) if _file(submodule) else None


def _file(module: str) -> pathlib.Path | None:
  path = ROOT.joinpath(*module.split('.'))
  for file in (path.with_suffix('.py'), path / '__init__.py'):
    if file.exists():
      return file
  return None


@functools.cache
def _tree(module: str) -> ast.Module:
  file = _file(module)
  return ast.parse(file.read_text() if file else '')


@functools.cache
def _definitions(module: str) -> dict[str, ast.AST]:
  """The top-level functions, classes and constants, and the whole module."""
  found = {}
  for node in _tree(module).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found[node.name] = node
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = getattr(node, 'targets', None) or [node.target]
      names = (n for t in targets for n in ast.walk(t))
      found |= {n.id: node for n in names if isinstance(n, ast.Name)}
  return found | {WHOLE: _tree(module)}


@functools.cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
  """What names that are imported anywhere in a module stand for."""
  found = {}
  for node in ast.walk(_tree(module)):
    if isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        found[alias.asname or alias.name] = node.module, alias.name
  return found


@functools.cache
def _named(module: str, name: str) -> tuple[tuple[str, str], ...]:
  """The names, and attributes of names, that a definition uses."""
  return tuple(_uses(module, _definitions(module)[name]))


def _uses(module: str, definition: ast.AST) -> Iterator[tuple[str, str]]:
  for node in ast.walk(definition):
    if isinstance(node, ast.Name):
      yield module, node.id
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      owner = _imports(module).get(node.value.id)
      if owner and _file('.'.join(owner)):
        yield '.'.join(owner), node.attr


@functools.cache
def _hash(module: str, name: str) -> str:
  text = f'{module}.{name}{_dump(_definitions(module)[name])}'
  return hashlib.sha256(text.encode()).hexdigest()


def _dump(node) -> str:
  """Like `ast.dump`, the same for every Python, and without docstrings."""
  if isinstance(node, list):
    return f'[{",".join(map(_dump, node))}]'
  if not isinstance(node, ast.AST):
    return repr(node)
  fields = {k: v for k, v in ast.iter_fields(node) if v not in (None, [])}
  body = fields.get('body')
  if isinstance(body, list) and _is_docstring(body[0]):
    fields['body'] = body[1:]
  fields = ','.join(f'{k}={_dump(v)}' for k, v in fields.items())
  return f'{type(node).__name__}({fields})'


def _is_docstring(node: ast.AST) -> bool:
  return (
    isinstance(node, ast.Expr)
    and isinstance(node.value, ast.Constant)
    and isinstance(node.value.value, str)
  )
