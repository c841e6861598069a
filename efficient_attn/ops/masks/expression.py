"""What makes a dataclass an expression: static numbers, arrays as leaves."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

STATIC = (numbers.Number, str, type(None))


@dataclass_transform(frozen_default=True)
def expression(cls):
  """Makes `cls` a frozen dataclass and a pytree.

  A field that holds a number, a word, None or a tuple of those is static: part
  of the tree's structure, and so known at trace time. Any other field is a
  child. `cls.axes` names the axes of the array fields, for `letters`.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = tuple(field.name for field in dataclasses.fields(cls))

  def flatten(node):
    # A node that a transformation rebuilt keeps its form, whatever its leaves.
    static = node.__dict__.get('_static')
    if static is None:
      static = tuple(
        (name, getattr(node, name))
        for name in names
        if _is_static(getattr(node, name))
      )
    known = dict(static)
    children = [
      (jax.tree_util.GetAttrKey(name), getattr(node, name))
      for name in names
      if name not in known
    ]
    return children, static

  def unflatten(static, children):
    # Not through __init__: transformations put placeholders in the leaves.
    node = object.__new__(cls)
    known = dict(static)
    children = iter(children)
    for name in names:
      value = known[name] if name in known else next(children)
      object.__setattr__(node, name, value)
    object.__setattr__(node, '_static', static)
    return node

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


def _is_static(value):
  if isinstance(value, tuple):
    return all(map(_is_static, value))
  return isinstance(value, STATIC)


def with_axes(function: Callable, tree: Any) -> Any:
  """An expression with function(array, axes) in place of its arrays."""

  def leaf(path, array):
    owner = tree
    for key in path[:-1]:
      owner = getattr(owner, key.name)
    axes = owner.axes[path[-1].name]
    return function(array, axes[len(axes) - array.ndim :])

  return jax.tree_util.tree_map_with_path(leaf, tree)


def letters(tree: Any) -> Any:
  """The axes of each array of an expression, as `sharding.local_op` wants.

  Axes of size 1 are '_': they are broadcast, not split.
  """

  def shown(array, axes):
    return ''.join(
      '_' if size == 1 else axis
      for axis, size in zip(axes, array.shape, strict=True)
    )

  return with_axes(shown, tree)


def cut(tree: Any, rows: Int[Array, 'R'], cols: Int[Array, 'C']) -> Any:
  """An expression with its arrays cut to one tile, as [#B, #N, #R, #C]."""
  return with_axes(lambda array, axes: cut_array(array, axes, rows, cols), tree)


def cut_array(
  array: Array | np.ndarray,
  axes: str,
  rows: Int[Array, 'R'],
  cols: Int[Array, 'C'],
) -> Array:
  """One array with some of the axes BNTS, cut to a tile, as [#B, #N, #R, #C].

  An axis of size 1 stays as it is.
  """
  array = jnp.asarray(array)
  for axis, letter in enumerate(axes):
    if letter in 'TS' and array.shape[axis] > 1:
      indices = rows if letter == 'T' else cols
      array = lax.dynamic_slice_in_dim(array, indices[0], indices.size, axis)
  sizes = dict(zip(axes, array.shape, strict=True))
  return array.reshape([sizes.get(axis, 1) for axis in 'BNTS'])


def quotient(x: Any, divisor: Any) -> Any:
  """Returns x // divisor, of traced arrays by operations that kernels have."""
  if isinstance(x, jax.Array) or isinstance(divisor, jax.Array):
    dtype = jnp.result_type(x, divisor)
    below = jnp.asarray(x - x % divisor, dtype)
    return lax.div(*jnp.broadcast_arrays(below, jnp.asarray(divisor, dtype)))
  return x // divisor
