"""The matrices of a model: what compression changes, layer by layer."""

from collections.abc import Callable

import jax
from flax import nnx

from efficient_attn.layers.param import matrices_apart


def summed_axes(path: tuple, p: nnx.Param) -> tuple[int, int] | None:
  """Returns from where to where the axes are that a product sums over.

  None for what is no matrix. The rows of an embedding are summed over where it
  makes logits.
  """
  if 'table' in path:
    return p.ndim - 1, p.ndim
  start = matrices_apart(p)
  return (start, start + p.inputs) if p.inputs else None


def map_matrices(
  model: nnx.Module, f: Callable[[nnx.Param, int, int], jax.Array]
) -> nnx.Module:
  """Returns a model with f(matrix, *summed_axes) in place of each matrix."""

  def change(path, p):
    axes = summed_axes(path, p)
    return p if axes is None else p.replace(f(p, *axes))

  graphdef, params = nnx.split(model)
  flat = [(path, change(path, p)) for path, p in nnx.to_flat_state(params)]
  return nnx.merge(graphdef, nnx.from_flat_state(flat))
