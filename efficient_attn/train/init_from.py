"""Beginning with the parameters of another run, as `config.init_from` says.

Parameters are compared by the name that they have in a single layer, as
`stack.layers.3.mixer.out.weight`: see `layers.layout`.
"""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax

from efficient_attn.config import Config, ConfigError
from efficient_attn.layers.adapter import is_adapter
from efficient_attn.layers.layout import restack, unstack
from efficient_attn.train.groups import flat
from efficient_attn.train.load import Run, open_run
from efficient_attn.train.state import Architecture, Params, nested

_SHOWN = 5  # names that an error lists


def check(config: Config, architecture: Architecture) -> Run | None:
  """Opens the run that a model begins with, if there is one.

  Raises:
    ConfigError: they differ in parameters that the config does not name.
  """
  options = config.init_from
  if not options.run:
    return None
  run = open_run(options.run, 'init_from.run')
  run.identity()  # it has a checkpoint
  ours, theirs = (_single(x) for x in (architecture, run.architecture))
  differences = {
    'new': [n for n in ours if n not in theirs and not is_adapter(n)],
    'unused': [name for name in theirs if name not in ours],
    'resized': [
      name
      for name in ours
      if name in theirs and ours[name].shape != theirs[name].shape
    ],
  }
  unnamed = {
    key: [name for name in names if not _named(name, getattr(options, key))]
    for key, names in differences.items()
  }
  if any(unnamed.values()):
    raise ConfigError(
      f'init_from.run={options.run!r} has other parameters than this model: '
      + '; '.join(
        f'init_from.{key} does not name {_list(names, ours, theirs)}'
        for key, names in unnamed.items()
        if names
      )
    )
  return run


def initial_values(
  run: Run, mesh: jax.sharding.Mesh
) -> Callable[[Params], Params]:
  """Returns a function from initial parameters to those taken from a run."""
  theirs = unstack(flat(run.params(mesh)))

  def taken(params):
    like = flat(params)
    found = {
      name: _overlaid(x, theirs[name]) if name in theirs else x
      for name, x in unstack(like).items()
    }
    restacked = restack(found, like)
    return nested(
      {
        name: jax.device_put(x, like[name].sharding)
        for name, x in restacked.items()
      }
    )

  return taken


def _overlaid(x, other):
  """Returns x with what both arrays have room for taken from the other."""
  if x.shape == other.shape:
    return other
  shared = tuple(map(slice, map(min, x.shape, other.shape)))
  return x.at[shared].set(other[shared])


def _single(architecture: Architecture) -> Mapping[str, Any]:
  return jax.eval_shape(unstack, flat(architecture.abstract_params()))


def _named(name, patterns):
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _list(names, ours, theirs):
  shown = ', '.join(
    ' and '.join(
      f'{"x".join(map(str, side[name].shape))} {where}'
      for side, where in ((ours, 'here'), (theirs, 'there'))
      if name in side
    ).join((f'{name} (', ')'))
    for name in names[:_SHOWN]
  )
  more = len(names) - _SHOWN
  return shown + (f' and {more} more' if more > 0 else '')
