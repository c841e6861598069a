"""Matrix products whose precision is left to the machine, found by tracing."""

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from efficient_attn.models.cost import equations

PRODUCTS = {
  'conv_general_dilated',
  'dot_general',
  'ragged_dot',
  'ragged_dot_general',
}
STATED = {jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST}


def faults(function, *args) -> set[str]:
  """Returns a line for each product of a call with a fault.

  Either its operands differ in dtype, or they are float32 at the default
  precision. Args are arrays or their shapes: nothing is run.
  """
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return {
    f'{fault}: {eqn.primitive.name} of {", ".join(map(str, shapes(eqn)))} at '
    f'{source_info_util.summarize(eqn.source_info)}'
    for eqn in equations(jaxpr)
    if eqn.primitive.name in PRODUCTS and (fault := fault_of(eqn))
  }


def shapes(eqn: core.JaxprEqn):
  return [v.aval.str_short(short_dtypes=True) for v in eqn.invars[:2]]


def fault_of(eqn: core.JaxprEqn) -> str | None:
  left, right = (v.aval.dtype for v in eqn.invars[:2])
  if left != right:
    return 'operands of two dtypes'
  precision = eqn.params['precision']
  if not isinstance(precision, tuple):
    precision = (precision,)
  if left == jnp.float32 and not STATED.issuperset(precision):
    return 'float32 without a precision'
  return None
