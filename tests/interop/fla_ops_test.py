"""Our ops against the references of flash-linear-attention, on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop import oracles

torch = pytest.importorskip('torch')
pytest.importorskip('fla')


@pytest.mark.parametrize('name', oracles.FLA_OPS)
def test_outputs_and_gradients(name):
  from tests.interop import compare, fla_ops

  case = fla_ops.CASES[name]()
  tensors = {
    k: torch.from_numpy(a).requires_grad_() for k, a in case.arrays.items()
  }
  expected = case.theirs(**tensors)
  weight = np.random.default_rng(1).standard_normal(expected.shape)
  weight = weight.astype(np.float32)
  torch.sum(expected * torch.from_numpy(weight)).backward()

  @jax.jit
  def grad(arrays):
    def loss(arrays):
      y = case.ours(**arrays)
      return jnp.sum(y * weight), y

    return jax.grad(loss, has_aux=True)(arrays)

  gradients, y = grad(case.arrays)
  assert compare.difference(y, expected) < compare.OUTPUTS
  for key, tensor in tensors.items():
    distance = compare.difference(gradients[key], tensor.grad)
    assert distance < compare.GRADIENTS, key
