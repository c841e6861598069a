"""Matrix products whose precision is stated, forward and backward.

At the default precision a TPU rounds the operands of a float32 product to
bfloat16, and a GPU to TF32. So a product has either bfloat16 operands, at the
full rate of the machine and with float32 sums, or full precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array


def product(
  spec: str,
  x: Array | np.ndarray,
  y: Array | np.ndarray,
  *,
  dtype: DTypeLike | None = None,
  operand: DTypeLike | None = None,
) -> Array:
  """Multiplies two arrays, with sums of at least float32.

  Of bfloat16 operands the cotangents are rounded to bfloat16 too: a product
  of a float32 cotangent and a bfloat16 operand would be one of float32.

  Args:
    spec: of `jnp.einsum`.
    x: first operand.
    y: second operand.
    dtype: of the sums and the result; by default float32, or float64 for such
      operands.
    operand: what the operands are cast to; by default the dtype that holds
      both.
  """
  operand = operand or jnp.promote_types(x.dtype, y.dtype)
  dtype = dtype or jnp.promote_types(operand, jnp.float32)
  x, y = x.astype(operand), y.astype(operand)
  if operand != jnp.bfloat16:
    return exact(spec, x, y, preferred_element_type=dtype)
  return _summed(spec, jnp.dtype(dtype), x, y)


# In full precision whatever the operands are: gates and their sums, solvers,
# states of one token, scores that select.
exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _summed(spec, dtype, x, y):
  return jnp.einsum(spec, x, y, preferred_element_type=dtype)


@functools.partial(_summed.defjvp, symbolic_zeros=True)
def _summed_jvp(spec, dtype, primals, tangents):
  """The tangent is rounded to the operands' dtype, and so are cotangents."""
  (x, y), (dx, dy) = primals, tangents
  terms = [
    jnp.einsum(spec, *operands).astype(dtype)
    for moved, operands in ((dx, (dx, y)), (dy, (x, dy)))
    if type(moved) is not SymbolicZero
  ]
  out = jnp.einsum(spec, x, y, preferred_element_type=dtype)
  return out, sum(terms)
