"""Single layers: by module, and by the names of their parameters."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn.config import LMConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.layout import restack, unstack
from efficient_attn.layers.stack import Stack

X = jax.random.normal(jax.random.key(1), (1, 6, 8))


def stack_of(pattern, num_layers, scan, seed=0):
  config = LMConfig(
    d_model=8,
    num_heads=2,
    num_layers=num_layers,
    pattern=pattern,
    scan_layers=scan,
    ffn='mlp',
  )
  return Stack(config, causal=True, rngs=nnx.Rngs(seed))


def flat(model, prefix='stack.'):
  """Parameters by dotted path, as numpy arrays, beside one of no layer."""
  found = nnx.to_flat_state(nnx.state(model, nnx.Param))
  params = {
    prefix + '.'.join(map(str, path)): np.asarray(p[...]) for path, p in found
  }
  return params | {'embed.table': np.ones((4, 8))}


def filled(model, params, prefix='stack.'):
  """The model with other values of its parameters."""
  graphdef, state = nnx.split(model)
  new = [
    (path, p.replace(jnp.asarray(params[prefix + '.'.join(map(str, path))])))
    for path, p in nnx.to_flat_state(state)
  ]
  return nnx.merge(graphdef, nnx.from_flat_state(new))


PATTERNS = {  # pattern, layers: with and without layers left over
  'one': (('attention',), 4),
  'two': (('gla', 'attention'), 4),
  'three and rest': (('gla', 'gla', 'attention'), 8),
  'rest only': (('gla', 'gla', 'attention'), 2),
  'once': (('gla', 'attention'), 3),
}
BOTH = list(itertools.product(PATTERNS, (False, True)))


@pytest.mark.parametrize('name, scan', BOTH)
def test_layers_one_by_one_are_the_stack(name, scan):
  pattern, count = PATTERNS[name]
  stack = stack_of(pattern, count, scan)
  x, layers = X, list(stack.layers())
  assert [b.name for b in layers] == [
    pattern[i % len(pattern)] for i in range(count)
  ]
  for block in layers:
    x, _, _ = block(x, Context(), None, None, {})
  np.testing.assert_allclose(x, stack(X)[0], atol=1e-5)


@pytest.mark.in_turn
@pytest.mark.parametrize('name', PATTERNS)
def test_scanned_and_unrolled_become_each_other(name):
  pattern, count = PATTERNS[name]
  scanned, unrolled = (stack_of(pattern, count, s) for s in (True, False))
  single = unstack(flat(scanned))
  for i, block in enumerate(scanned.layers()):
    ours = {k: v for k, v in single.items() if f'.layers.{i}.' in k}
    wanted = flat(block, f'stack.layers.{i}.')
    del wanted['embed.table']
    assert set(ours) == set(wanted)
    for key in ours:
      np.testing.assert_array_equal(ours[key], wanted[key])
  params = restack(single, like=flat(unrolled))
  assert set(params) == set(flat(unrolled))
  same = filled(unrolled, params)
  np.testing.assert_allclose(same(X)[0], scanned(X)[0], atol=1e-5)
  back = restack(unstack(params), like=flat(scanned))
  for key, value in flat(scanned).items():
    np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize('scan', [False, True])
def test_a_model_of_another_pattern_takes_the_layers_it_has(scan):
  old = stack_of(('attention',), 4, not scan, seed=1)
  new = stack_of(('gla', 'attention'), 4, scan)
  taken, single = unstack(flat(old)), unstack(flat(new))
  same = {
    k: v for k, v in taken.items() if k in single and v.shape == single[k].shape
  }
  params = restack(single | same, like=flat(new))
  for a, b in zip(filled(new, params).layers(), old.layers(), strict=True):
    assert a.name == 'gla' or (a.mixer.out.weight == b.mixer.out.weight).all()
    assert (a.ffn.up.weight[...] == b.ffn.up.weight[...]).all()


def test_several_stacks_and_shapes_alone():
  one, two = (stack_of(('gla', 'attention'), n, True) for n in (4, 5))
  params = flat(one, 'encoder.') | flat(two, 'decoder.')
  single = unstack(params)
  names = {'.'.join(k.split('.')[:3]) for k in single if 'layers' in k}
  assert names == {f'encoder.layers.{i}' for i in range(4)} | {
    f'decoder.layers.{i}' for i in range(5)
  }
  shapes = jax.eval_shape(unstack, params)
  assert {k: v.shape for k, v in shapes.items()} == {
    k: v.shape for k, v in single.items()
  }
  back = jax.eval_shape(lambda p: restack(unstack(p), like=params), params)
  assert {k: v.shape for k, v in back.items()} == {
    k: v.shape for k, v in params.items()
  }
  arrays = restack(single, params).values()
  assert all(isinstance(x, np.ndarray) for x in arrays)
  assert set(unstack(flat(one, ''))) >= {'layers.3.mixer.out.weight'}


def test_layers_that_do_not_fit():
  params = flat(stack_of(('attention',), 4, True))
  single = unstack(params)
  less = {k: v for k, v in single.items() if 'layers.3' not in k}
  with pytest.raises(ValueError, match='are missing: .*layers.3'):
    restack(less, params)
  more = single | {'stack.layers.4.mixer.out.weight': np.ones(2)}
  with pytest.raises(ValueError, match='no place .*layers.4'):
    restack(more, params)
  name = 'stack.layers.1.mixer.out.weight'
  with pytest.raises(ValueError, match='layers.1.*one shape'):
    restack(single | {name: np.ones(2)}, params)
  with pytest.raises(ValueError, match='embed.table is'):
    restack(single | {'embed.table': np.ones(2)}, params)
  name = next(k for k in params if k.endswith('out.weight'))
  with pytest.raises(ValueError, match='repetitions'):
    unstack(params | {name: params[name][:2]})
