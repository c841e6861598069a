"""Renames the parameters of stacks, between their layout and single layers.

Parameters are flat: a dict of arrays by dotted path. A stack of blocks holds
layer i = F + r P + j, block j of repetition r of a pattern of P blocks, as

  <stack>.first.blocks.<i>.<rest>        the first F layers, before the pattern
  <stack>.periods.blocks.<j>.<rest>      scanned: arrays [repetitions, ...]
  <stack>.periods.<r>.blocks.<j>.<rest>  unrolled
  <stack>.rest.blocks.<j>.<rest>         behind the last full repetition

and as `<stack>.layers.<i>.<rest>` where layers are single. Other names stay. A
teacher of one pattern initialises a student of another, scanned or not:

  single = unstack(student) | {k: v for k, v in unstack(teacher).items() if ...}
  student = restack(single, like=student)
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_STACKED = re.compile(
  r'(?P<stack>|.*?\.)'
  r'(?:(?P<first>first)|rest|(?P<periods>periods)(?:\.(?P<repeat>\d+))?)'
  r'\.blocks\.(?P<block>\d+)\.(?P<rest>.+)'
)


def unstack(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the arrays of single layers.

  Args:
    params: all parameters of a model, numpy or jax arrays. For shapes use
      `jax.eval_shape(unstack, params)`.
  """
  found = {}
  for name, layers in layers_of(params).items():
    if isinstance(layers, str):
      found[layers] = params[name]
    else:
      found |= {x: params[name][r, ...] for r, x in enumerate(layers)}
  return found


def restack(
  layers: Mapping[str, jax.Array], like: Mapping[str, Any]
) -> dict[str, jax.Array]:
  """Returns the arrays of single layers in the layout of another model.

  Args:
    layers: by name, as of `unstack`.
    like: arrays or shapes of all parameters of the other model.

  Raises:
    ValueError: a parameter is missing, left over, or of another shape.
  """
  wanted = layers_of(like)
  names = {
    x for v in wanted.values() for x in ([v] if isinstance(v, str) else v)
  }
  for said, other in (
    ('are missing', names - set(layers)),
    ('have no place in the other model', set(layers) - names),
  ):
    if other:
      raise ValueError(f'{len(other)} parameters {said}: {min(other)!r}, ...')
  found = {}
  for name, sources in wanted.items():
    if isinstance(sources, str):
      found[name] = layers[sources]
    else:
      found[name] = _stacked([layers[x] for x in sources], sources)
    if found[name].shape != like[name].shape:
      raise ValueError(
        f'{name} is {like[name].shape} but its layers make it '
        f'{found[name].shape}'
      )
  return found


def _stacked(arrays, names):
  """Stacks the arrays of one parameter of several layers."""
  for name, array in zip(names, arrays, strict=True):
    if array.shape != arrays[0].shape:
      raise ValueError(
        f'{name} is {array.shape} but {names[0]} {arrays[0].shape}: a scan '
        'needs layers of one shape'
      )
  host = all(isinstance(x, np.ndarray) for x in arrays)
  return (np if host else jnp).stack(arrays)


def layers_of(params) -> dict[str, str | list[str]]:
  """Returns the single name of each parameter, or those of its repetitions."""
  places = {name: _STACKED.fullmatch(name) for name in params}
  sizes = {}  # by stack, the repetitions and the blocks of its pattern
  firsts = {}  # by stack, the layers before
  for name, place in places.items():
    if place and place['first']:
      count = max(firsts.get(place['stack'], 0), int(place['block']) + 1)
      firsts[place['stack']] = count
    if place and place['periods']:
      repeats, blocks = sizes.get(place['stack'], (0, 0))
      count = int(place['repeat'] or params[name].shape[0] - 1) + 1
      if not place['repeat'] and repeats not in (0, count):
        raise ValueError(
          f'{name} has {count} repetitions, but others of its stack {repeats}'
        )
      blocks = max(blocks, int(place['block']) + 1)
      sizes[place['stack']] = max(repeats, count), blocks

  found = {}
  for name, place in places.items():
    if not place:
      found[name] = name
      continue
    repeats, blocks = sizes.get(place['stack'], (0, 0))

    def layer(r, place=place, blocks=blocks):
      i = r * blocks + int(place['block'])
      i += 0 if place['first'] else firsts.get(place['stack'], 0)
      return f'{place["stack"]}layers.{i}.{place["rest"]}'

    if place['first']:
      found[name] = layer(0)
    elif place['periods'] and not place['repeat']:
      found[name] = [layer(r) for r in range(repeats)]
    elif place['periods']:
      found[name] = layer(int(place['repeat']))
    else:
      found[name] = layer(repeats)
  return found
