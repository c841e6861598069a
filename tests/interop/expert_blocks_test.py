"""Mixtures of experts against transformers, with the same weights."""

import jax
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

NAMES = (
  'mixtral',
  'qwen3_moe',
  'qwen3_moe, not normalised',
  'olmoe',
  'deepseek_v2',
  'deepseek_v3',
  'gpt_oss',
)


def test_every_case_is_here():
  from tests.interop import expert_blocks

  assert set(expert_blocks.CASES) == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_outputs_and_every_gradient(name):
  import torch

  from tests.interop import compare, expert_blocks

  case = expert_blocks.CASES[name]()
  x, dy = compare.inputs(9), compare.inputs(9, seed=1)
  y, dx, dparams = expert_blocks.gradients(case.ours, x, dy)
  theirs = torch.from_numpy(x).requires_grad_()
  expected = case.theirs(theirs)
  expected = expected[0] if isinstance(expected, tuple) else expected
  torch.sum(expected * torch.from_numpy(dy)).backward()
  assert compare.difference(y, expected) < compare.OUTPUTS
  assert compare.difference(dx, theirs.grad) < compare.GRADIENTS
  wanted = case.arrays(
    {k: p.grad.numpy() for k, p in case.theirs.named_parameters()}
  )
  assert set(wanted) == set(dparams) - {'router.correction'}
  for path, gradient in wanted.items():
    difference = compare.difference(dparams[path], gradient)
    assert difference < compare.GRADIENTS, path


@pytest.mark.parametrize('name', ['mixtral', 'qwen3_moe', 'olmoe', 'gpt_oss'])
def test_the_loss_of_even_loads_and_its_gradient(name):
  """Of one layer, with padding left out."""
  import importlib

  import torch

  from tests.interop import compare, expert_blocks

  case = expert_blocks.CASES[name]()
  family = importlib.import_module(
    f'transformers.models.{name}.modeling_{name}'
  )
  x = compare.inputs(9)
  real = np.ones((2, 9), bool)
  real[1, 6:] = False
  router = getattr(case.theirs, case.router)
  logits = router(torch.from_numpy(x).reshape(-1, expert_blocks.D))[0]
  expected = family.load_balancing_loss_func(
    (logits,), expert_blocks.E, expert_blocks.K, torch.from_numpy(real)
  )
  expected.backward()

  @jax.jit
  @jax.value_and_grad
  def loss(ours):
    logits = ours.router.logits(x)
    _, ids = ours.router(logits)
    penalty, _ = ours.router.penalty(logits, ids, real)
    return penalty / ours.router.routing.balance_weight

  found, gradient = loss(case.ours)
  np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
  difference = compare.difference(
    gradient.router.weight[...], router.weight.grad.T
  )
  assert difference < compare.GRADIENTS
