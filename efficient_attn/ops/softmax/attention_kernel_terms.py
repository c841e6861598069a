"""Masks and biases as the kernels of attention take them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import masks

# Tiles whose lists fit the scalar memory.
MOST_TILES = 2**16


@dataclasses.dataclass(frozen=True)
class _InTile:
  """An expression as a function of a kernel: see `kernels.attention.terms`."""

  tree: Any  # a treedef, which has a hash
  flags: tuple[bool, ...]  # which arrays hold truth values

  def __call__(self, query, key, arrays):
    shape = jnp.broadcast_shapes(query.shape, key.shape)
    arrays = [
      jnp.broadcast_to(x, shape) != 0 if flag else x
      for x, flag in zip(arrays, self.flags, strict=True)
    ]
    return self.tree.unflatten(arrays).in_tile(query, key)


def learned_arrays(
  form: Any, expression: Any, learned: Sequence[bool]
) -> tuple[bool, ...]:
  """Returns the arrays of a kernel's form of an expression with a gradient.

  Args:
    form: what `in_kernel` gave, maybe of the arrays of the expression.
    expression: as it was passed.
    learned: which arrays of `expression`, in order, may have one.
  """
  known = {
    id(x): flag
    for x, flag in zip(jax.tree.leaves(expression), learned, strict=True)
  }

  def learns(path, x):
    owner = form
    for key in path[:-1]:
      owner = getattr(owner, key.name)
    inexact = jnp.issubdtype(x.dtype, jnp.inexact)
    return path[-1].name not in owner.fixed and known.get(id(x), inexact)

  return tuple(
    learns(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(form)
  )


def to_term(expression: Any, learned: Sequence[bool] = ()) -> tuple:
  """A mask or a bias as the kernels take it: (term, arrays).

  Args:
    expression: a mask or a bias, or None.
    learned: which of its arrays, in order, have a gradient.
  """
  from efficient_attn.kernels.attention.terms import Term

  if expression is None:
    return None, ()
  leaves, tree = jax.tree.flatten(expression)
  axes = jax.tree.leaves(masks.letters(expression))
  arrays = []
  for x, letters in zip(leaves, axes, strict=True):
    x = jnp.asarray(x)
    kept = [i for i, a in enumerate(letters) if a != '_']
    arrays.append(x.reshape([x.shape[i] for i in kept]))
  term = Term(
    function=_InTile(tree, tuple(x.dtype == bool for x in arrays)),
    axes=tuple(a.replace('_', '') for a in axes),
    learned=tuple(i for i, learns in enumerate(learned) if learns),
  )
  return term, tuple(arrays)


def may_admit(mask: masks.Mask | None, schedule: Any) -> jax.Array | None:
  """Tells which tiles may admit a pair, [#B, #N, tiles]; None: all may."""
  T, S = schedule.length, schedule.keys
  R, C = min(schedule.rows, T), min(schedule.cols, S)
  corner = jnp.arange(R), jnp.arange(C)
  if mask is None or mask.maybe(*corner) is True:
    return None
  i = schedule.array('blocks')
  spans = np.diff(schedule.array('starts').reshape(-1, 5)).sum(1)
  p = np.repeat(np.arange(len(spans)), spans) // schedule.num_blocks
  j = p * schedule.span + schedule.array('tiles')
  rows = jnp.asarray(np.minimum(i * schedule.rows, T - R))
  cols = jnp.asarray(np.minimum(j * schedule.cols, S - C))

  def of_tile(mask, row, col):
    return mask.maybe(row + corner[0], col + corner[1])

  def of_tiles(mask):
    found = jax.vmap(functools.partial(of_tile, mask))(rows, cols)
    return found.astype(jnp.int32)

  def over(letter, function):
    """Maps a function of a mask over an axis of its arrays."""

    def run(mask):
      leaves, tree = jax.tree.flatten(mask)
      axes = [
        a.find(letter) if letter in a else None
        for a in jax.tree.leaves(masks.letters(mask))
      ]
      if all(axis is None for axis in axes):
        return function(mask)[None]

      def one(*leaves):
        return function(
          tree.unflatten(
            [
              x if axis is None else jnp.expand_dims(x, axis)
              for x, axis in zip(leaves, axes, strict=True)
            ]
          )
        )

      return jax.vmap(one, in_axes=axes)(*leaves)

    return run

  found = over('B', over('N', of_tiles))(mask)
  if found.size > MOST_TILES:
    found = jnp.max(found, axis=(0, 1), keepdims=True)
  return found
