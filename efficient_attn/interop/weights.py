"""Moves the parameters of a model from the tensors of files, and to them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.interop.files import Tensor, write_tensors
from efficient_attn.interop.plan import Piece, Plan
from efficient_attn.layers.layout import layers_of


def read_params(
  plan: Plan,
  tensors: Mapping[str, Tensor],
  params: Mapping[str, Any],
  dtype: np.dtype | None = None,
) -> dict[str, jax.Array]:
  """Returns the parameters, each shard read where it goes.

  Args:
    plan: of the model.
    tensors: by the first of their names in the plan.
    params: shapes and shardings of the parameters by name.
    dtype: of the parameters; None: that of the file.
  """
  sources, found = layers_of(params), {}
  # The largest first: it is twice in memory while little else is.
  for name in sorted(params, key=lambda n: -math.prod(params[n].shape)):
    like = params[name]
    read = _reader(plan, tensors, sources[name], like.shape, dtype)
    found[name] = jax.make_array_from_callback(like.shape, like.sharding, read)
  return found


def _reader(plan, tensors, sources, shape, dtype):
  """Returns a function from the index of a shard to its values."""
  layers = [sources] if isinstance(sources, str) else sources
  stacked = not isinstance(sources, str)
  experts = Piece(layers[0]) not in plan.places
  outer = stacked + experts

  def piece(place):
    name = layers[place[0]] if stacked else layers[0]
    return Piece(name, place[-1] if experts else None)

  kinds = {}
  for place in np.ndindex(*shape[:outer]):
    names = plan.places[piece(place)][0].names
    kinds.setdefault(tensors[names[0]].dtype, names[0])
  if len(kinds) > 1 and dtype is None:
    said = ' and '.join(f'{name} is {kind}' for kind, name in kinds.items())
    raise ConfigError(f'{said}: tensors of one kind need one dtype')
  (kind,) = [dtype] if dtype is not None else kinds

  def read(index):
    ranges = [range(*i.indices(n)) for i, n in zip(index, shape, strict=True)]
    out = _aligned([len(r) for r in ranges], kind)
    for place in np.ndindex(*out.shape[:outer]):
      at = [r[i] for r, i in zip(ranges, place, strict=False)]
      transfer, part = plan.places[piece(at)]
      tensor = tensors[transfer.names[0]].map()
      found = transfer.rule.read(tensor, transfer.shapes, part)
      _copy(out[(*place, ...)], found[index[outer:]])
    return out

  return read


def _copy(out, found):
  """Copies an array, by a cache line of each row where it is transposed.

  Row by row, numpy would read a line of the file for every number.
  """
  if found.flags.c_contiguous or not found.ndim:
    out[...] = found
    return
  line = 64 // found.dtype.itemsize
  for i in range(0, found.shape[-1], line):
    out[..., i : i + line] = found[..., i : i + line]


def _aligned(shape, dtype):
  """Allocates an array that JAX takes over on CPU without a copy."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  room = np.empty(size + 64, np.uint8)
  begin = -room.ctypes.data % 64
  return room[begin : begin + size].view(dtype).reshape(shape)


def write_params(
  plan: Plan, params: Mapping[str, jax.Array], directory
) -> None:
  """Writes the tensors of the parameters to files of a directory."""
  places = {}
  for name, sources in layers_of(params).items():
    if isinstance(sources, str):
      places[sources] = name, None
    else:
      places |= {source: (name, r) for r, source in enumerate(sources)}

  def piece(found):
    name, layer = places[found.name]
    value = np.asarray(params[name])
    value = value if layer is None else value[layer]
    return value if found.expert is None else value[found.expert]

  transfers, shapes = {}, {}
  for transfer in plan.transfers:
    name = transfer.names[0]
    dtype = {np.dtype(params[places[p.name][0]].dtype) for p in transfer.pieces}
    if len(dtype) > 1:
      raise ConfigError(f'{name}: its parameters have several dtypes: {dtype}')
    transfers.setdefault(name, []).append(transfer)
    shapes[name] = transfer.shape, *dtype

  def value(name):
    first, *others = (
      transfer.rule.write([piece(p) for p in transfer.pieces])
      for transfer in transfers[name]
    )
    if not all(np.array_equal(first, other) for other in others):
      raise ConfigError(
        f'{name} is one tensor of several blocks, whose parameters differ'
      )
    return first

  write_tensors(directory, shapes, value)
