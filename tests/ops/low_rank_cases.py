"""An op against its oracle: outputs, and the gradient of every input."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np

STEP = 1e-5


def normal(seed, **shapes):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def place(arrays):
  """As arrays of jax, which the ops' annotations ask for outside of jit."""
  return {name: jnp.asarray(x) for name, x in arrays.items()}


@contextlib.contextmanager
def unchecked():
  """Turns the annotations off, so that the ops' own errors are seen."""
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', False)


def check(op, oracle, arrays, *, tolerance=1e-11, slope=1e-7):
  """Both take the arrays by name; the oracle's slopes are differences."""
  expected = oracle(**arrays)
  rng = np.random.default_rng(5)
  weight = rng.standard_normal(expected.shape)

  def run(arrays):
    out, pull = jax.vjp(lambda arrays: op(**arrays), arrays)
    return out, pull(weight)[0]

  with jax.enable_x64(True):
    result = jax.jit(run)(arrays)
  out, gradients = jax.tree.map(np.asarray, result)
  assert out.dtype == np.float64
  np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)
  for name, x in arrays.items():
    direction = rng.standard_normal(x.shape)
    ends = [
      np.sum(weight * oracle(**arrays | {name: x + step * direction}))
      for step in (STEP, -STEP)
    ]
    np.testing.assert_allclose(
      np.sum(gradients[name] * direction),
      (ends[0] - ends[1]) / (2 * STEP),
      rtol=slope,
      atol=slope,
      err_msg=name,
    )
