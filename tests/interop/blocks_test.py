"""Our mixers against the blocks of Hugging Face transformers, on CPU.

Independent code with the same weights: the extra `oracle` installs it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

B, T = 2, 37
LENGTHS = (5, 1, 20, 11)
PREFILL = 34
OUTPUTS, GRADIENTS = 1e-5, 1e-4
# Optimising the programs would take longer than running them.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
NAMES = (
  'gated_deltanet',
  'kda',
  'mamba',
  'mamba2',
  'mlstm_layer',
  'rg_lru',
  'rwkv4',
)
every_block = pytest.mark.parametrize('name', NAMES)


def pair(name):
  from tests.interop import blocks

  return blocks.BLOCKS[name]()


def inputs(batch=B, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((batch, T, 32)).astype(np.float32)


def difference(a, b):
  """The largest difference by the largest number; both are not trivial."""
  a, b = (np.asarray(x.detach() if hasattr(x, 'detach') else x) for x in (a, b))
  assert a.shape == b.shape and np.isfinite(a).all()
  assert np.abs(b).max() > 1e-3
  return np.abs(a - b).max() / np.abs(b).max()


@every_block
def test_outputs(name):
  p, x = pair(name), inputs()
  y, _ = jit(p.ours)(x)
  with torch.no_grad():
    expected = p.theirs(torch.from_numpy(x))
  assert difference(y, expected) < OUTPUTS


@every_block
def test_gradients_of_the_inputs(name):
  p, x, weight = pair(name), inputs(), inputs(seed=1)

  @jit
  @functools.partial(jax.grad, has_aux=True)
  def grad(x):
    y, _ = p.ours(x)
    return jnp.sum(y * weight), y

  theirs = torch.from_numpy(x).requires_grad_()
  expected = p.theirs(theirs)
  torch.sum(expected * torch.from_numpy(weight)).backward()
  gradient, y = grad(x)
  assert difference(gradient, theirs.grad) < GRADIENTS
  # Not the numbers of the test above: on CPU only this takes the chunks.
  assert difference(y, expected) < OUTPUTS


@every_block
def test_packed_segments(name):
  p, x = pair(name), inputs()
  ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None].repeat(B, 0)
  y, _ = jit(p.ours)(x, segment_ids=ids)
  cuts = itertools.pairwise(np.cumsum((0, *LENGTHS)))
  with torch.no_grad():
    expected = [p.theirs(torch.from_numpy(x[:, a:b])) for a, b in cuts]
  assert difference(y, torch.cat(expected, 1)) < OUTPUTS


@every_block
def test_prefill_and_decode(name):
  p, x = pair(name), inputs(batch=1)
  step = jit(lambda x, cache: p.ours(x, cache=cache))
  cache = p.ours.init_cache(1, T, jnp.float32)
  theirs = p.new_cache()
  for a, b in itertools.pairwise((0, *range(PREFILL, T + 1))):
    y, cache = step(x[:, a:b], cache)
    with torch.no_grad():
      expected = p.theirs(torch.from_numpy(x[:, a:b]), theirs)
    assert difference(y, expected) < OUTPUTS
