"""Reads config files, and the `config.json` of runs, and writes the latter."""

import importlib.util
import inspect
import json
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from efficient_attn.config import Config, ConfigError, as_dict
from efficient_attn.formats import FORMAT, upgrade
from efficient_attn.values import nearest


def load(path: str) -> dict[str, Any]:
  """Reads `file.py[:arg]` or the `config.json` of a run into a plain dict."""
  if str(path).endswith('.json'):
    return read_json(find(path))
  module, arg = load_module(path)
  return as_dict(call(module, 'get_config', arg))


def find(path: str) -> pathlib.Path:
  """Returns the file of `--config`, which must exist."""
  file = pathlib.Path(path).expanduser()
  if file.suffix not in ('.py', '.json'):
    raise ConfigError(
      f'--config={path!r}: give a .py file with get_config(), as '
      'configs/lm/quickstart.py[:arg], or the config.json of a run'
    )
  if not file.is_file():
    others = [p.name for p in file.parent.glob(f'*{file.suffix}')]
    raise ConfigError(
      f'--config={path!r}: no such file; {nearest(file.name, others or ["-"])}'
    )
  return file


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """Reads the `config.json` of a run, of this format or an older one."""
  try:
    values = json.loads(file.read_text())
  except OSError as error:
    raise ConfigError(f'{file} cannot be read: {error.strerror}') from None
  except (ValueError, RecursionError) as error:
    raise ConfigError(
      f'{file} is not JSON ({_first_line(error)}); restore it, or start over '
      'in a new workdir'
    ) from None
  if not isinstance(values, dict) or not isinstance(values.get('model'), dict):
    raise ConfigError(
      f'{file} is not the config of a run, which has the key "model"; restore '
      'it, or start over in a new workdir'
    )
  written = values.pop('format', 0)
  if not isinstance(written, int) or not 0 <= written <= FORMAT:
    raise ConfigError(
      f'{file} has the format {written!r} and this version reads up to '
      f'{FORMAT}; use the version that wrote it'
    )
  return {**values, 'model': upgrade(values['model'], written, str(file))}


def load_module(path: str) -> tuple[types.ModuleType, str]:
  """Runs `file.py[:arg]`; returns the module and arg.

  A config file may import its neighbours.
  """
  head, colon, arg = str(path).partition('.py:')
  file = find(f'{head}.py' if colon else path)
  spec = importlib.util.spec_from_file_location(f'config.{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  folder = str(file.parent.resolve())
  sys.path.insert(0, folder)
  try:
    spec.loader.exec_module(module)
  finally:
    sys.path.remove(folder)
  return module, arg


def call(module: types.ModuleType, name: str, arg: str) -> Mapping[str, Any]:
  """Returns what a config file's `get_config` or `sweep` returns for arg."""
  function = getattr(module, name, None)
  if not callable(function):
    raise ConfigError(f'--config={module.__file__!r} has no {name}()')
  takes = inspect.signature(function).parameters
  if arg and not takes:
    raise ConfigError(f'--config={module.__file__!r} takes no :{arg}')
  values = function(arg) if takes else function()
  if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
    raise ConfigError(
      f'--config={module.__file__!r}: {name}() returned a '
      f'{type(values).__name__}; return an ml_collections.ConfigDict or a dict'
    )
  return values


def save(config: Config, path: pathlib.Path) -> None:
  """Writes the resolved config so that `load` can relaunch the run."""
  new = path.with_suffix('.new')
  values = {'format': FORMAT} | as_dict(config)
  new.write_text(json.dumps(values, indent=2, allow_nan=False) + '\n')
  new.replace(path)  # a kill leaves the old file or the new one


def _first_line(error):
  return str(error).partition('\n')[0]
