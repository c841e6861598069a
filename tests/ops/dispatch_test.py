"""Which implementation runs where, and what can be done with its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from efficient_attn.ops import dispatch
from efficient_attn.ops.per_platform import differentiable, per_platform
from efficient_attn.values import ConfigError


def row(platforms, reason=None):
  return dispatch.Implementation(
    call=None,
    forward=None,
    backward=None,
    platforms=platforms,
    refuses=lambda size: reason if size > 1 else None,
  )


TABLE = {
  'fast': row(('tpu',), 'size is over 1'),
  'slow': row(('tpu', 'cuda')),
}


def choose(implementation, size=1):
  return dispatch.choose(TABLE, implementation, op='op', size=size)


def test_each_platform_takes_the_first_row_that_is_willing():
  assert choose(None) == {'tpu': 'fast', 'cuda': 'slow'}
  assert choose(None, 2) == {'tpu': 'slow', 'cuda': 'slow'}
  assert choose('fast') == {None: 'fast'}
  assert choose('xla') == {}
  assert choose(('fast', 'slow')) == {None: 'fast'}
  assert choose(('fast', 'slow'), 2) == {None: 'slow'}
  assert choose(('fast', 'xla'), 2) == {}


def test_a_name_fails_with_the_reason():
  with pytest.raises(NotImplementedError, match='op: .* fast: size is over 1'):
    choose('fast', 2)
  with pytest.raises(ConfigError, match="did you mean 'slow'"):
    choose('slwo')
  with pytest.raises(ConfigError, match='implementation is empty'):
    choose(())


def test_the_explanation_names_every_platform():
  explain = functools.partial(dispatch.explain, TABLE, op='op')
  assert explain(None, size=2) == (
    'cpu: xla; tpu: slow; cuda: slow; rocm: xla; not fast: size is over 1'
  )
  assert explain('slow', size=1).startswith('cpu: slow; tpu: slow')
  assert 'fast: size is over 1' in explain('fast', size=2)


# A function that is a sine by definition and a tangent by the kernel: which of
# them runs can be read off a program.
KERNELS = {'tpu': jnp.tan}
call = functools.partial(per_platform, jnp.sin, KERNELS)


def operations(function, *args, platforms, names=('sine', 'tan', 'cosine')):
  text = export.export(jax.jit(function), platforms=platforms)(*args)
  return {name for name in names if f'.{name} ' in text.mlir_module()}


def test_the_platform_is_the_one_that_a_program_is_lowered_for():
  x = jnp.ones(3)
  assert operations(call, x, platforms=['cpu']) == {'sine'}
  assert operations(call, x, platforms=['tpu']) == {'tan'}
  assert operations(call, x, platforms=['cpu', 'tpu']) == {'sine', 'tan'}


def test_other_platforms_never_trace_a_kernel():
  def kernel(x):
    raise AssertionError('traced')

  either = functools.partial(per_platform, jnp.sin, {'tpu': kernel})
  x = jnp.ones(3)
  np.testing.assert_array_equal(jax.jit(jax.vmap(either))(x), jnp.sin(x))
  with pytest.raises(AssertionError, match='traced'):
    operations(either, x, platforms=['tpu'])


def test_a_named_kernel_is_interpreted_elsewhere():
  found = []

  def kernel(x, interpret):
    found.append(interpret)
    return x

  table = {
    'kernel': dispatch.Implementation(
      kernel, kernel, kernel, ('tpu',), lambda: None
    )
  }
  for rows, platforms, wanted in (
    ({None: 'kernel'}, ['cpu'], [True]),
    ({None: 'kernel'}, ['tpu'], [False]),
    ({'tpu': 'kernel'}, ['cpu'], []),
    ({'tpu': 'kernel'}, ['tpu'], [False]),
  ):
    found.clear()
    one = functools.partial(
      per_platform, jnp.sin, dispatch.kernels(table, rows, 'call')
    )
    operations(one, jnp.ones(3), platforms=platforms)
    assert found == wanted, (rows, platforms)


def test_a_program_of_several_devices_needs_shard_map_for_a_kernel():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  x = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P('x')))
  assert operations(call, x, platforms=['tpu']) == {'sine'}
  each = jax.shard_map(
    call, mesh=mesh, in_specs=jax.P('x'), out_specs=jax.P('x')
  )
  assert operations(each, x, platforms=['tpu']) == {'tan'}


def test_a_kernel_of_plain_jax_is_divided_among_devices():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  x = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P('x')))
  both = functools.partial(
    call, partitionable=dict.fromkeys(('tpu', 'cuda'), jnp.cos)
  )
  assert operations(both, x, platforms=['tpu']) == {'cosine'}
  one = jnp.ones(3)
  assert operations(both, one, platforms=['tpu']) == {'tan'}
  assert operations(both, one, platforms=['cuda']) == {'cosine'}
  assert operations(jax.vmap(both), one, platforms=['cuda']) == {'cosine'}
  assert operations(both, one, platforms=['cpu']) == {'sine'}


def power(x, y, n):
  """x^n y, whose gradient kernels are written out."""
  return x**n * y


def _forward(x, y, n):
  return power(x, y, n), x ** (n - 1)


def _backward(args, saved, cotangent):
  x, y, n = args
  return cotangent * n * saved * y, cotangent * saved * x, None


def _kernel(function):
  # Twice the truth, to be told from the definition.
  return lambda *args: jax.tree.map(lambda x: 2 * x, function(*args))


def op(x, y, n, kernels):
  on = ('cpu', 'tpu') if kernels else ()

  def stage(function):
    return functools.partial(
      per_platform, function, {p: _kernel(function) for p in on}
    )

  function = differentiable(
    stage(power), stage(_forward), stage(_backward), power
  )
  return function(x, y, n)


X, Y = jnp.linspace(0.5, 1.5, 4), jnp.linspace(-1, 1, 4)
N = jnp.int32(3)


def total(function):
  return lambda x, y: jnp.sum(function(x, y, N))


TRANSFORMS = {
  'grad': lambda f: jax.grad(total(f), (0, 1))(X, Y),
  'grad of one': lambda f: jax.grad(total(f), 1)(X, Y),
  'jvp': lambda f: jax.jvp(total(f), (X, Y), (Y, X)),
  'jvp of one': lambda f: jax.jvp(lambda x: total(f)(x, Y), (X,), (Y,)),
  'jacfwd': lambda f: jax.jacfwd(lambda x: f(x, Y, N))(X),
  'hessian': lambda f: jax.hessian(total(f), (0, 1))(X, Y),
  'grad of grad': lambda f: jax.grad(
    lambda x: jnp.sum(jnp.sin(jax.grad(total(f))(x, Y)))
  )(X),
  'forward over reverse': lambda f: jax.jvp(
    jax.grad(total(f), (0, 1)), (X, Y), (Y, X)
  ),
  'transposed tangent': lambda f: jax.linear_transpose(
    lambda t: jax.jvp(lambda x: f(x, Y, N), (X,), (t,))[1], X
  )(Y),
  'vmap of grad': lambda f: jax.vmap(
    jax.grad(lambda x, y: f(x, y, N)), in_axes=(0, None)
  )(X, Y[0]),
  'grad of vmap': lambda f: jax.grad(
    lambda x, y: jnp.sum(jax.vmap(f, (0, None, None))(x, y, N) ** 2), (0, 1)
  )(X, Y[0]),
  'vmap over the integer': lambda f: jax.vmap(
    lambda n: jax.grad(lambda x: jnp.sum(f(x, Y, n)))(X)
  )(jnp.arange(1, 4)),
  'checkpoint': lambda f: jax.grad(jax.checkpoint(total(f)))(X, Y),
  'scan': lambda f: jax.grad(
    lambda x: jax.lax.scan(lambda c, _: (f(c, Y, N), None), x, length=2)[
      0
    ].sum()
  )(X),
}


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('transform', TRANSFORMS)
def test_every_transformation_agrees_with_plain_jax(transform, jit):
  run = TRANSFORMS[transform]
  run = jax.jit(run, static_argnums=0) if jit else run
  for x, y in zip(
    jax.tree.leaves(run(functools.partial(op, kernels=False))),
    jax.tree.leaves(run(power)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6)


def test_kernels_run_forward_and_backward():
  f = functools.partial(op, kernels=True)
  out, pull = jax.vjp(lambda x, y: f(x, y, N), X, Y)
  # The output is doubled; so are the residual and the cotangents.
  np.testing.assert_allclose(out, 2 * power(X, Y, N), rtol=1e-6)
  expected = jax.vjp(lambda x, y: power(x, y, N), X, Y)[1](jnp.ones(4))
  for x, y in zip(pull(jnp.ones(4)), expected, strict=True):
    np.testing.assert_allclose(x, 4 * y, rtol=1e-6)
  np.testing.assert_allclose(f(X, Y, N), 2 * power(X, Y, N), rtol=1e-6)
