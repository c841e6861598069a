"""Captured values: the same however layers are stacked, and free if not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers import block, capture
from efficient_attn.layers.capture import captured, passing, tap
from efficient_attn.layers.context import Context
from efficient_attn.layers.stack import Stack

NAMES = ('mixer', 'ffn', 'block')
X = jax.random.normal(jax.random.key(1), (2, 6, 8))


@functools.cache
def stack_of(**changes):
  options = dict(
    d_model=8,
    num_heads=2,
    num_layers=5,
    pattern=('gla', 'attention'),
    ffn='mlp',
    dtype='float32',
  )
  config = LMConfig(**options | changes)
  return Stack(config, causal=True, rngs=nnx.Rngs(0))


def by_hand(stack, x):
  """What each layer adds, and the stream behind it."""
  found = {name: [] for name in NAMES}
  for layer in stack.layers():
    y, _ = layer.mixer(layer.mixer_norm(x), Context())
    z = layer.ffn(layer.ffn_norm(x + y))
    x = x + y + z
    for name, value in zip(NAMES, (y, z, x), strict=True):
      found[name].append(value)
  return found


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_captured_values_are_those_of_each_layer(scan, remat):
  made = stack_of(scan_layers=scan, remat=remat)
  run = jax.jit(lambda stack, x: captured(stack, *NAMES)(x))
  (y, _), found = run(made, X)
  np.testing.assert_allclose(y, jax.jit(made)(X)[0], atol=1e-6)
  wanted = by_hand(made, X)
  assert {name: len(values) for name, values in found.items()} == dict.fromkeys(
    NAMES, 5
  )
  for name in NAMES:
    for ours, theirs in zip(found[name], wanted[name], strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-5)
  np.testing.assert_array_equal(found['block'][-1], y)


def test_only_some_layers_tap_a_name():
  _, found = captured(stack_of(num_layers=8), 'key', 'block')(X)
  assert len(found['key']) == 4 and len(found['block']) == 8
  assert found['key'][0].shape == (2, 6, 2, 4)


@pytest.mark.in_turn
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_gradients_of_captured_values(remat):
  """A loss on hidden states, as in distillation."""
  made = stack_of(remat=remat, num_layers=4)
  graphdef, params = nnx.split(made)

  def distil(hidden):
    return sum((i + 1) * jnp.sum(x**2) for i, x in enumerate(hidden))

  def loss(params, x):
    _, found = captured(nnx.merge(graphdef, params), 'block')(x)
    return distil(found['block'])

  def plain(params, x):
    return distil(by_hand(nnx.merge(graphdef, params), x)['block'])

  ours, theirs = (
    jax.jit(jax.grad(f, (0, 1)))(params, X) for f in (loss, plain)
  )
  for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def equation(f, x):
  """The jaxpr of a function, without the addresses of functions in it."""
  text = str(jax.make_jaxpr(f)(x))
  return '\n'.join(line for line in text.splitlines() if ' at 0x' not in line)


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_model_that_is_not_captured_is_the_same_program(
  scan, remat, monkeypatch
):
  made = stack_of(scan_layers=scan, remat=remat, num_layers=4)

  def run(x):
    return made(x)[0]

  before = equation(run, X)
  asked = equation(lambda x: captured(made, 'ffn')(x)[1], X)
  assert equation(run, X) == before != asked
  monkeypatch.setattr(block, 'tap', lambda name, x: x)
  monkeypatch.setattr(capture, 'scan', jax.lax.scan)
  monkeypatch.setattr(capture, 'passing', lambda transform, f: transform(f))
  assert equation(run, X) == before


def test_a_call_inside_of_another_tells_both():
  def inner(x):
    return tap('b', tap('a', x) + 1)

  def outer(x):
    y, found = captured(inner, 'a')(x)
    assert list(found) == ['a']
    return tap('b', 2 * y)

  y, found = captured(outer, 'b')(1)
  assert (y, found) == (4, {'b': [2, 4]})
  vmapped = passing(jax.vmap, inner)
  _, found = captured(vmapped, 'a')(jnp.arange(3))
  np.testing.assert_array_equal(found['a'][0], jnp.arange(3))


def test_what_cannot_be_captured():
  made = stack_of(num_layers=2)
  with pytest.raises(ValueError, match="as 'blocks', only .*'block'"):
    captured(made, 'blocks')(X)
  compiled = jax.jit(lambda x: made(x)[0])
  with pytest.raises(ValueError, match='capture inside: jax.jit'):
    captured(compiled, 'block')(X)
  compiled(X)  # its program is kept, in which there are no taps
  with pytest.raises(ValueError, match='jax.jit'):
    captured(compiled, 'block')(X)
  assert capture._OPEN.get() is None
