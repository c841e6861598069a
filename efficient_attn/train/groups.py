"""Parameter groups: what `optimizer.groups` says of the parameters it names."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import optax

from efficient_attn.config import ConfigError, OptimizerConfig
from efficient_attn.layers.adapter import is_adapter
from efficient_attn.values import nearest

OTHERS, FROZEN = '', None


def group_of_each(
  names: Iterable[str], config: OptimizerConfig, adapted: bool = False
) -> dict[str, str | None]:
  """Returns the group of each parameter, by its path.

  Args:
    names: the paths of all parameters.
    config: with groups, of which no two match the same parameter.
    adapted: whether the model has adapters, beside which only groups train.

  Returns:
    The name of a group, OTHERS or FROZEN.
  """
  names = list(names)
  found = {
    name: FROZEN if adapted and not is_adapter(name) else OTHERS
    for name in names
  }
  owners = {}
  for group, options in config.groups.items():
    key = f'optimizer.groups.{group}.match'
    if not options.match:
      raise ConfigError(f"{key} is empty; name parameters, as '*.mixer.*'")
    for name in matching(key, options.match, names):
      if owners.setdefault(name, group) != group:
        raise ConfigError(
          f'{key}={options.match} and optimizer.groups.{owners[name]}.match='
          f'{config.groups[owners[name]].match} both match {name}; let one of '
          'them leave it out'
        )
      found[name] = FROZEN if options.frozen else group
  if all(group is FROZEN for group in found.values()):
    raise ConfigError(
      'optimizer.groups freezes every parameter; leave some to train'
    )
  return found


def matching(key: str, patterns: Iterable[str], names: list[str]) -> set[str]:
  """Returns the names that a pattern matches; each has to match one."""
  found = set()
  for pattern in patterns:
    some = fnmatch.filter(names, pattern)
    if not some:
      raise ConfigError(
        f'{key}={pattern!r} matches no parameter; {nearest(pattern, names)}'
      )
    found.update(some)
  return found


def config_of(config: OptimizerConfig, group: str) -> OptimizerConfig:
  """Returns what the optimizer of a group is made from."""
  if group == OTHERS:
    return config
  options = {
    field.name: getattr(config.groups[group], field.name)
    for field in dataclasses.fields(config.groups[group])
    if field.name not in ('match', 'frozen')
  }
  given = {name: x for name, x in options.items() if x is not None}
  return dataclasses.replace(config, **given)


def by_group(
  optimizers: Mapping[str, optax.GradientTransformationExtraArgs],
  groups: Mapping[str, str],
) -> optax.GradientTransformationExtraArgs:
  """Lets each optimizer see the parameters of its group alone.

  Each is given a flat dict of its parameters by path (see `path_of`).

  Args:
    optimizers: by group.
    groups: the group of each parameter, by path.
  """

  def parts(tree):
    found = {group: {} for group in optimizers}
    for name, leaf in flat(tree).items():
      found[groups[name]][name] = leaf
    return found

  def joined(found, like):
    leaves = {k: v for part in found.values() for k, v in part.items()}
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [leaves[name] for name in flat(like)])

  def init(params):
    return {
      group: optimizers[group].init(part)
      for group, part in parts(params).items()
    }

  def update(updates, state, params, *, obj_fn, **extra):
    own, found, states = parts(params), {}, {}
    for group, part in parts(updates).items():

      def objective(changed, group=group):
        return obj_fn(joined(own | {group: changed}, params))

      found[group], states[group] = optimizers[group].update(
        part, state[group], own[group], obj_fn=objective, **extra
      )
    return joined(found, updates), states

  return optax.GradientTransformationExtraArgs(init, update)


def flat(tree: Any) -> dict[str, Any]:
  """Returns the leaves of nested dicts by their paths, 'stack.norm.scale'."""
  return {
    path_of(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def path_of(path: tuple) -> str:
  """Spells a path of JAX as the names of parameters are."""
  return jax.tree_util.keystr(path, simple=True, separator='.')
