"""What every comparison of a `Pair` checks, and how close it has to be."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import torch

OUTPUTS, GRADIENTS = 1e-5, 1e-4


def inputs(length, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((batch, length, 32)).astype(np.float32)


def difference(a, b):
  """The largest difference by the largest number; both are not trivial."""
  a, b = (np.asarray(x.detach() if hasattr(x, 'detach') else x) for x in (a, b))
  assert a.shape == b.shape
  chex.assert_tree_all_finite(a)
  assert np.abs(b).max() > 1e-3
  return np.abs(a - b).max() / np.abs(b).max()


def check_gradients(pair, length):
  """The output, as it is in training, and the gradient of the input."""
  x, weight = inputs(length), inputs(length, seed=1)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def grad(x):
    y, _ = pair.ours(x)
    return jnp.sum(y * weight), y

  theirs = torch.from_numpy(x).requires_grad_()
  expected = pair.theirs(theirs)
  torch.sum(expected * torch.from_numpy(weight)).backward()
  gradient, y = grad(x)
  assert difference(y, expected) < OUTPUTS
  assert difference(gradient, theirs.grad) < GRADIENTS


def check_decoding(pair, length, cuts, batch=1):
  """The output of pieces that end at `cuts`, each side with its cache."""
  x = inputs(length, batch)
  step = jax.jit(lambda x, cache: pair.ours(x, cache=cache))
  cache = pair.ours.init_cache(batch, length, jnp.float32)
  theirs = pair.new_cache()
  for a, b in itertools.pairwise((0, *cuts)):
    y, cache = step(x[:, a:b], cache)
    with torch.no_grad():
      expected = pair.theirs(torch.from_numpy(x[:, a:b]), theirs)
    assert difference(y, expected) < OUTPUTS
