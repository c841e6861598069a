"""Products with stated precision: operands, sums and cotangents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.models.cost import equations
from efficient_attn.ops.products import product

SPEC = 'bij,bjk->bik'


def arrays(*dtypes):
  rng = np.random.default_rng(0)
  shapes = (2, 8, 16), (2, 16, 4)
  return [
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape, dtype in zip(shapes, dtypes, strict=True)
  ]


def gradient(x, y, **options):
  out, pull = jax.vjp(lambda x, y: product(SPEC, x, y, **options), x, y)
  return pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))


def dots(function, *args):
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return [e for e in equations(jaxpr) if e.primitive.name == 'dot_general']


def test_bfloat16_has_float32_sums_and_no_float32_operand():
  x, y = arrays('bfloat16', 'bfloat16')
  out = product(SPEC, x, y)
  assert out.dtype == jnp.float32
  wide = jnp.einsum(SPEC, x.astype(jnp.float32), y.astype(jnp.float32))
  np.testing.assert_allclose(out, wide, rtol=1e-6, atol=1e-6)
  found = dots(gradient, x, y)
  assert len(found) == 3
  for eqn in found:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize(
  'dtypes', [('float32', 'float32'), ('bfloat16', 'float32')]
)
def test_float32_is_multiplied_in_full_precision(dtypes):
  found = dots(gradient, *arrays(*dtypes))
  assert len(found) == 3
  for eqn in found:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype('float32')}
    assert set(eqn.params['precision']) == {jax.lax.Precision.HIGHEST}


def test_operand_says_what_is_multiplied():
  found = dots(
    lambda x, y: gradient(x, y, operand=jnp.bfloat16),
    *arrays('float32', 'bfloat16'),
  )
  for eqn in found:
    assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype('bfloat16')}


def test_derivatives_of_bfloat16_are_those_of_float32_but_for_rounding():
  x, y = arrays('bfloat16', 'bfloat16')
  wide = arrays('bfloat16', 'bfloat16')
  wide = [z.astype(jnp.float32) for z in wide]
  for narrow, expected in zip(gradient(x, y), gradient(*wide), strict=True):
    assert narrow.dtype == jnp.bfloat16
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
      narrow.astype(jnp.float32), expected, atol=0.01 * scale
    )
  _, tangent = jax.jvp(lambda x: product(SPEC, x, y), (x,), (x,))
  np.testing.assert_allclose(
    tangent, product(SPEC, x, y), atol=0.01 * np.abs(tangent).max()
  )


def test_second_derivatives_and_float64():
  with jax.enable_x64(True):
    x, y = arrays('float64', 'float64')
    assert product(SPEC, x, y).dtype == jnp.float64
    assert product(SPEC, *arrays('bfloat16', 'float64')).dtype == jnp.float64
  x, y = arrays('bfloat16', 'bfloat16')
  curvature = jax.hessian(lambda x: jnp.sum(product(SPEC, x, y) ** 2))
  wide = jax.hessian(
    lambda x: jnp.sum(product(SPEC, x, y.astype(jnp.float32)) ** 2)
  )
  narrow = curvature(x).astype(jnp.float32)
  expected = wide(x.astype(jnp.float32))
  np.testing.assert_allclose(
    narrow, expected, atol=0.02 * np.abs(expected).max()
  )
