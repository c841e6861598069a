"""Quantises the weights of a model: values that few bits can hold.

Matrices are rounded to the nearest (see `ops.softmax.fake_quant`), and the
products stay in the dtype of the activations: this tells how well a model works
with such weights and how many bytes they take, not how fast they can be. Groups
of weights that share a scale lie along the axes that a product sums over.
"""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from efficient_attn.compress.matrices import map_matrices, summed_axes
from efficient_attn.config import choose
from efficient_attn.ops.softmax.fake_quant import fake_quant


@dataclasses.dataclass(frozen=True)
class Format:
  """A way to store matrices; all else is in 16 bits.

  Attributes:
    bits: of a weight.
    form: of `fake_quant`; '' for float16.
    group: how many weights share a scale; None for those of an output channel.
    group_bits: of what is stored with a group, its scale and zero point.
  """

  bits: int
  form: str = ''
  group: int | None = 1
  group_bits: int = 0


FORMATS = {
  'float16': Format(16),
  'int8': Format(8, 'int8', None, 32),
  'int4': Format(4, 'int4', 128, 16),
  'uint4': Format(4, 'uint4', 128, 32),  # with zero points
}


def quantized(model: nnx.Module, name: str) -> nnx.Module:
  """Returns the model with its matrices as a format of `FORMATS` holds them."""
  chosen = choose('format', name, FORMATS)

  def put(p, start, end):
    x = p[...]
    if not chosen.form:
      return x.astype(jnp.float16).astype(x.dtype)
    apart, inputs = math.prod(x.shape[:start]), math.prod(x.shape[start:end])
    flat = x.reshape(apart, inputs, -1)
    flat = fake_quant(flat, chosen.form, (1, chosen.group, 1))
    return flat.reshape(x.shape).astype(x.dtype)

  return map_matrices(model, put)


def stored_bytes(
  model: nnx.Module, name: str, embeddings: bool = True
) -> float:
  """Returns the bytes of a model's parameters in a format.

  Args:
    model: may have shapes in place of arrays.
    name: in `FORMATS`.
    embeddings: whether those are in this format too, or in 16 bits.
  """
  chosen, total = choose('format', name, FORMATS), 0
  for path, p in nnx.to_flat_state(nnx.state(model)):
    axes = summed_axes(path, p)
    if axes is None or ('table' in path and not embeddings):
      total += 16 * p.size
      continue
    inputs = math.prod(p.shape[slice(*axes)])
    groups = p.size // inputs * -(-inputs // (chosen.group or inputs))
    total += chosen.bits * p.size + chosen.group_bits * groups
  return total / 8
