"""The weights of mixtures of experts of transformers, by our names.

Imported after `pytest.importorskip('torch')`.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import numpy as np
import torch
from flax import nnx

from efficient_attn.layers.ffn import ACTIVATIONS
from efficient_attn.layers.ffns import FFNS
from efficient_attn.layers.moe import MoE
from efficient_attn.layers.router import Routing
from tests.interop.pairs import D, put, randomize

F, E, K = 12, 8, 3


class Case(NamedTuple):
  """A block of theirs and the arrays of ours made of its parameters.

  Attributes:
    ours: with values.
    theirs: their module, which returns y or (y, ...).
    arrays: from their parameters, or gradients of them, by name, to ours by
      path; both ways are linear.
    router: the name of their router.
  """

  ours: MoE
  theirs: torch.nn.Module
  arrays: callable
  router: str = 'gate'


def build(routing: dict, activation: str = 'silu', **options) -> MoE:
  def make():
    return FFNS['moe'](
      D,
      F,
      ACTIVATIONS[activation],
      num_experts=E,
      top_k=K,
      router=Routing(**routing),
      rngs=nnx.Rngs(0),
      **options,
    )

  return nnx.eval_shape(make)


def theirs(family: str, block: str, **config):
  """Builds a block of a family, its experts computed one by one."""
  module = importlib.import_module(
    f'transformers.models.{family}.modeling_{family}'
  )
  made = module.__dict__[config.pop('config')](
    hidden_size=D,
    num_experts_per_tok=K,
    num_hidden_layers=1,
    experts_implementation='eager',
    **config,
  )
  return getattr(module, block)(made).eval()


def stacked(w, shared: str = ''):
  """Gate rows, then up rows, of all experts: [E, 2F, D] and [E, D, F]."""
  gate, up = np.split(w['experts.gate_up_proj'], 2, axis=1)
  found = {
    'router.weight': w['gate.weight'].T,
    'gate.weight': gate.swapaxes(1, 2),
    'up.weight': up.swapaxes(1, 2),
    'down.weight': w['experts.down_proj'].swapaxes(1, 2),
  }
  for part in ('gate', 'up', 'down') if shared else ():
    found[f'shared.{part}.weight'] = w[f'{shared}.{part}_proj.weight'].T
  return found


def case(ours, block, arrays, router='gate', **centers) -> Case:
  w = randomize(block, **centers)
  for name, value in arrays(w).items():
    put(functools.reduce(getattr, name.split('.'), ours), value)
  return Case(ours, block, arrays, router)


def mixtral() -> Case:
  block = theirs(
    'mixtral',
    'MixtralSparseMoeBlock',
    config='MixtralConfig',
    intermediate_size=F,
    num_local_experts=E,
  )
  return case(build({}), block, stacked)


def qwen3_moe(normalize: bool = True) -> Case:
  block = theirs(
    'qwen3_moe',
    'Qwen3MoeSparseMoeBlock',
    config='Qwen3MoeConfig',
    moe_intermediate_size=F,
    num_experts=E,
    norm_topk_prob=normalize,
  )
  return case(build(dict(normalize=normalize)), block, stacked)


def olmoe() -> Case:
  block = theirs(
    'olmoe',
    'OlmoeSparseMoeBlock',
    config='OlmoeConfig',
    intermediate_size=F,
    num_experts=E,
  )
  return case(build(dict(normalize=False)), block, stacked)


def deepseek_v2() -> Case:
  block = theirs(
    'deepseek_v2',
    'DeepseekV2Moe',
    config='DeepseekV2Config',
    moe_intermediate_size=F,
    n_routed_experts=E,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
    topk_method='group_limited_greedy',
    routed_scaling_factor=1.5,
  )
  routing = dict(normalize=False, groups=4, top_groups=2, scale=1.5)
  arrays = functools.partial(stacked, shared='shared_experts')
  return case(build(routing, shared_dim=2 * F), block, arrays)


def deepseek_v3() -> Case:
  block = theirs(
    'deepseek_v3',
    'DeepseekV3MoE',
    config='DeepseekV3Config',
    moe_intermediate_size=F,
    n_routed_experts=E,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
  )
  correction = 0.3 * np.random.default_rng(0).standard_normal(E)
  bias = block.gate.e_score_correction_bias
  bias.copy_(torch.from_numpy(correction))
  routing = dict(
    scores='sigmoid',
    correction=True,
    groups=4,
    top_groups=2,
    group_best=2,
    scale=2.5,
  )
  arrays = functools.partial(stacked, shared='shared_experts')
  found = case(build(routing, shared_dim=F), block, arrays)
  put(found.ours.router.correction, correction.astype(np.float32))
  return found


def gpt_oss() -> Case:
  """Gate and up interleaved, all [in, out]; the clamp is at 0.5."""
  block = theirs(
    'gpt_oss',
    'GptOssMLP',
    config='GptOssConfig',
    intermediate_size=F,
    num_local_experts=E,
    swiglu_limit=0.5,
  )

  def arrays(w):
    both, bias = w['experts.gate_up_proj'], w['experts.gate_up_proj_bias']
    return {
      'router.weight': w['router.weight'].T,
      'router.bias': w['router.bias'],
      'gate.weight': both[..., ::2],
      'gate.bias': bias[..., ::2],
      'up.weight': both[..., 1::2],
      'up.bias': bias[..., 1::2],
      'down.weight': w['experts.down_proj'],
      'down.bias': w['experts.down_proj_bias'],
    }

  ours = build(dict(bias=True), 'quick_gelu', bias=True, limit=0.5, offset=1.0)
  return case(ours, block, arrays, router='router')


CASES = {
  'mixtral': mixtral,
  'qwen3_moe': qwen3_moe,
  'qwen3_moe, not normalised': functools.partial(qwen3_moe, normalize=False),
  'olmoe': olmoe,
  'deepseek_v2': deepseek_v2,
  'deepseek_v3': deepseek_v3,
  'gpt_oss': gpt_oss,
}


def gradients(ours: MoE, x, dy):
  """Returns y, and the gradients of <y, dy>: of x, and by path."""

  @jax.jit
  def run(ours, x):
    y = ours(x)
    return (y * dy).sum(), y

  (dparams, dx), y = jax.grad(run, (0, 1), has_aux=True)(ours, x)
  flat = nnx.to_flat_state(nnx.state(dparams))
  return y, dx, {'.'.join(map(str, path)): p[...] for path, p in flat}
