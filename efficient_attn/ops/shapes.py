"""What the linear family checks of its arrays, and how it groups heads."""

from collections.abc import Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# What explanations need of a tensor.
Shaped: TypeAlias = Array | jax.ShapeDtypeStruct

READS = ('inclusive', 'exclusive')


def check_qkv(q: Array, k: Array, v: Array) -> None:
  """Checks queries and keys [B, T, K, H] and values [B, T, N, V].

  Raises:
    ValueError: with the axis that is wrong, its sizes and the remedy.
  """
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.ndim != 4:
      raise ValueError(
        f'{name} has shape {x.shape}: pass [batch, length, heads, channels].'
      )
    check_floating(name, x)
  if q.shape != k.shape:
    raise ValueError(
      f'q has shape {q.shape} and k {k.shape}: they must be equal, only v may '
      'have more heads.'
    )
  batch, length, kv_heads, _ = k.shape
  if v.shape[:2] != (batch, length):
    raise ValueError(
      f'v has batch and length {v.shape[:2]}, k has {(batch, length)}: pass '
      'equal ones.'
    )
  if v.shape[2] % kv_heads:
    raise ValueError(
      f'v has {v.shape[2]} heads, not a multiple of the {kv_heads} heads of k: '
      'repeat or regroup the heads.'
    )


def check_shapes(wanted: Mapping[str, tuple[Array | None, tuple]]) -> None:
  """Checks name: (array or None, its shape)."""
  for name, (x, shape) in wanted.items():
    if x is not None and x.shape != shape:
      raise ValueError(f'{name} has shape {x.shape}: pass {shape}.')


def check_read(read: str) -> None:
  """Refuses what is neither 'inclusive' nor 'exclusive'."""
  if read not in READS:
    raise ValueError(f'read = {read!r}: pass one of {READS}.')


def check_directions(bidirectional: bool, initial_state) -> None:
  """Refuses a state before the first token where there is none."""
  if bidirectional and initial_state is not None:
    raise ValueError(
      'initial_state has no meaning with bidirectional=True, which has no '
      'first token: drop one of the two.'
    )


def check_floating(name: str, x: Array) -> None:
  """Refuses integers, booleans, floats of 8 bits, and arrays of no numbers."""
  if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1:
    raise ValueError(
      f'{name} has dtype {x.dtype}: cast it to a floating type of 16 bits or '
      'more.'
    )
  if x.size == 0:
    raise ValueError(
      f'{name} has shape {x.shape}: axis {x.shape.index(0)} is empty; pass 1 '
      'or more.'
    )


def check_log_decay(log_decay: Array) -> None:
  """Refuses gates that are not floating or, where values are known, > 0."""
  check_floating('log_decay', log_decay)
  if not isinstance(log_decay, jax.core.Tracer):
    top = np.max(np.asarray(log_decay, np.float32), initial=-np.inf)
    if top > 0:
      raise ValueError(
        f'log_decay has the positive value {top:g}, a state that grows: pass '
        'logarithms of decays, e.g. jax.nn.log_sigmoid(gate).'
      )


def accumulator(*arrays) -> jnp.dtype:
  """The dtype of states and sums: float32, or float64 for such inputs."""
  leaves = [x.dtype for x in jax.tree.leaves(arrays)]
  return jnp.promote_types(jnp.result_type(*leaves), jnp.float32)


def operand(dtype: jnp.dtype, *arrays: Array) -> jnp.dtype:
  """The dtype of the operands of matrix products: bfloat16 stays bfloat16."""
  wanted = jnp.result_type(*arrays)
  return wanted if wanted == jnp.bfloat16 else dtype


# A factor that may be learned.
Scalar: TypeAlias = float | int | Float[Array, '']


def fold_scale(query: Array, scale: Scalar) -> tuple[Array, float | int]:
  """Returns queries and a scale that is a number: an array goes into them.

  For loops that are compiled apart from what surrounds them.
  """
  if isinstance(scale, (float, int)):
    return query, scale
  return (query * scale).astype(query.dtype), 1.0


def group(x: Array, kv_heads: int, *, axis: int) -> Array:
  """Splits the axis of N heads into [K, N // K]."""
  return x.reshape(*x.shape[:axis], kv_heads, -1, *x.shape[axis + 1 :])
