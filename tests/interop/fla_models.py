"""Small models of flash-linear-attention, which run on a CPU.

Imported after `pytest.importorskip('fla')`. Their kernels need a GPU: the
references of the same package take their place, and PyTorch's own functions
that of what is fused; see `fla_layers`.
"""

import contextlib
import importlib
import warnings
from unittest import mock

import fla.models  # noqa: F401 (transformers learns of them)
import torch
import transformers
from fla.layers import attn
from torch.nn import functional

from tests.interop.fla_layers import Conv, reference, rms

V = 97
TINY = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  norm_eps=1e-3,
  bos_token_id=None,
  eos_token_id=None,
)
HEADS = TINY | dict(num_heads=2)
WIDE = HEADS | dict(head_dim=12, expand_v=1.5)

# Name of a case, which begins with its model_type -> words of its config.
CASES = {
  'gla': TINY | dict(num_heads=4),
  'gla-conv': HEADS
  | dict(use_short_conv=True, conv_size=3, expand_k=1.0, expand_v=0.5),
  'gla-tied': HEADS | dict(tie_word_embeddings=True, num_hidden_layers=2),
  'retnet': HEADS,
  'gsa': HEADS | dict(num_slots=5, gate_logit_normalizer=4),
  'hgrn2': TINY | dict(expand_ratio=8, use_lower_bound=False),
  'delta_net': HEADS | dict(allow_neg_eigval=True),
  'delta_net-plain': HEADS
  | dict(use_short_conv=False, expand_k=0.5, expand_v=0.75),
  'gated_deltanet': WIDE,
  'gated_deltanet-shared': WIDE | dict(num_v_heads=6, num_heads=3),
  'gated_deltaproduct': WIDE | dict(num_householder=3, use_forget_gate=True),
  'gated_deltaproduct-one': WIDE | dict(num_heads=3, allow_neg_eigval=True),
  'comba': WIDE,
  'kda': WIDE,
  'kda-negative': WIDE | dict(allow_neg_eigval=True, conv_size=3),
  'kda-bounded': WIDE | dict(safe_gate=True, lower_bound=-5),
  'kda-shared': WIDE | dict(num_v_heads=4),
  'kda-hybrid': WIDE
  | dict(
    attn=[
      dict(layers=[1], num_heads=4, num_kv_heads=2, rope_theta=100.0),
      dict(layers=[2, 4], num_heads=2, qkv_bias=True, window_size=7),
    ],
    num_hidden_layers=6,
  ),
  'gla-hybrid': HEADS | dict(attn=dict(layers=[2], num_heads=4)),
}


def attend(q, k, v, causal, window_size):
  """Takes the place of the package flash_attn, without which none is built."""
  assert causal
  length, (left, _) = q.shape[1], window_size
  seen = torch.ones(length, length, dtype=torch.bool).tril()
  seen = seen if left < 0 else seen.triu(-left)
  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  o = functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
  return o.transpose(1, 2)


attn.flash_attn_func = attend


def make(case: str) -> torch.nn.Module:
  """Returns a random model in float32, whose norms run in PyTorch."""
  torch.manual_seed(0)
  config = transformers.AutoConfig.for_model(
    case.partition('-')[0], **CASES[case]
  )
  with warnings.catch_warnings():  # theirs are about what may train better
    warnings.simplefilter('ignore')
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  return model.float()


def unit(x):
  """Their l2 norm in the kernel."""
  return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def heads_first(naive, *arrays):
  o, _ = naive(*(x.transpose(1, 2) for x in arrays))
  return o.transpose(1, 2), None


def gla(q, k, v, gk, **_):
  return reference('gla.naive', 'naive_recurrent_gla')(q, k, v, gk)


def hgrn2(q, k, v, gk, **_):
  """The scale of GLA, which HGRN2's ops of theirs leave in, is 1 here."""
  return gla(q * q.shape[-1] ** 0.5, k, v, gk)


def retention(q, k, v, **_):
  naive = reference('retention.naive', 'naive_retention')
  o = naive(*(x.transpose(1, 2) for x in (q, k, v)))
  return o.transpose(1, 2), None


def gsa(q, k, v, s, g, scale, **_):
  naive = reference('gsa.naive', 'naive_recurrent_gsa')
  return naive(q, k, v, s, g, scale)


def norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, **_):
  x = functional.rms_norm(x, x.shape[-1:], norm_weight, 1e-3)
  return functional.linear(x, linear_weight, linear_bias)


def delta(q, k, v, beta, **_):
  naive = reference('delta_rule.naive', 'delta_rule_recurrence')
  return heads_first(naive, unit(q), unit(k), v, beta)


def recurrence(q, k, v, beta, log_decay, erase=None):
  """S = diag(a) S + beta k (v - (diag(a) S)^T k)^T, o = S^T q / sqrt(H).

  The loop stands for kernels whose references have other arguments. With
  `erase` the state is read by it, before it decays.
  """
  B, T, N, H = q.shape
  state = q.new_zeros(B, N, H, v.shape[-1])
  out = []
  for t in range(T):
    old, decay = state, log_decay[:, t].exp()
    state = state * (
      decay[..., None] if decay.ndim == 3 else decay[..., None, None]
    )
    read = state if erase is None else old
    key = k[:, t] if erase is None else erase[:, t]
    seen = torch.einsum('bnhv,bnh->bnv', read, key)
    write = beta[:, t, :, None] * (v[:, t] - seen)
    state = state + torch.einsum('bnh,bnv->bnhv', k[:, t], write)
    out.append(torch.einsum('bnhv,bnh->bnv', state, q[:, t]) * H**-0.5)
  return torch.stack(out, 1), None


def gated_delta(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **_):
  groups = v.shape[2] // q.shape[2]
  q, k = (x.repeat_interleave(groups, 2) for x in (unit(q), unit(k)))
  decay = -A_log.exp() * functional.softplus(g + dt_bias)
  beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
  return recurrence(q, k, v, beta, decay)


def kda(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, lower_bound, **_):
  groups = v.shape[2] // q.shape[2]
  q, k = (x.repeat_interleave(groups, 2) for x in (unit(q), unit(k)))
  dt, rate = g + dt_bias.view(g.shape[2:]), A_log.exp()[:, None]
  beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
  decay = -rate * functional.softplus(dt)
  if lower_bound is not None:
    decay = lower_bound * torch.sigmoid(rate * dt)
  return recurrence(q, k, v, beta, decay)


def comba(q, k, v, p, g, beta, **_):
  return recurrence(unit(q), unit(k), v, beta, g, erase=unit(p))


def product(q, k, v, beta, g=None, **_):
  """The steps of a token are tokens, as the layer of theirs calls it."""
  return recurrence(
    unit(q), unit(k), v, beta, torch.zeros_like(beta) if g is None else g
  )


KERNELS = {
  'gla': dict(fused_recurrent_gla=gla),
  'retnet': dict(
    chunk_retention=retention, fused_recurrent_retention=retention
  ),
  'gsa': dict(fused_recurrent_gsa=gsa, rms_norm_linear=norm_linear),
  'hgrn2': dict(
    fused_recurrent_gla=hgrn2,
    swish=functional.silu,
    rms_norm_linear=norm_linear,
  ),
  'delta_net': dict(chunk_delta_rule=delta, fused_recurrent_delta_rule=delta),
  'gated_deltanet': dict(fused_recurrent_gated_delta_rule=gated_delta),
  'gated_deltaproduct': dict(fused_recurrent_gated_delta_rule=product),
  'comba': dict(fused_recurrent_comba=comba),
  'kda': dict(fused_recurrent_kda=kda),
}


def run_norm(norm):
  """Returns the forward of an `RMSNorm`, which adds a residual first."""

  def forward(x, residual=None, prenorm=False, **_):
    x = x if residual is None else x + residual
    y = rms(x, norm)
    return (y, x) if prenorm else y

  return forward


def run_gated(norm):
  """Returns the forward of a `FusedRMSNormGated`."""
  sigmoid = norm.activation == 'sigmoid'
  gate = torch.sigmoid if sigmoid else functional.silu
  return lambda o, g: rms(o, norm) * gate(g)


def run_rotary(rotary):
  """Returns the forward of a `RotaryEmbedding`."""
  from fla.modules.rotary.ops import rotary_embedding_ref

  def forward(q, k, **_):
    steps = torch.arange(0, q.shape[-1], 2) / q.shape[-1]
    angles = torch.arange(q.shape[1])[:, None] / rotary.base**steps
    waves = angles.cos(), angles.sin()
    return tuple(rotary_embedding_ref(x, *waves) for x in (q, k))

  return forward


def run_mlp(mlp):
  """Returns the forward of a `GatedMLP`."""
  return lambda x, **_: mlp.down_proj(
    functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
  )


RUNS = {
  'GatedMLP': run_mlp,
  'RMSNorm': run_norm,
  'FusedRMSNormGated': run_gated,
  'SwishFeatureMap': lambda _: functional.silu,
  'ShortConvolution': lambda conv: Conv(conv).forward,
  'RotaryEmbedding': run_rotary,
}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens) -> torch.Tensor:
  """Returns the logits of a model on a CPU."""
  (layer,) = {type(x.attn) for x in model.model.layers} - {attn.Attention}
  module = importlib.import_module(layer.__module__)
  kernels = KERNELS[model.config.model_type]
  kernels = {k: v for k, v in kernels.items() if hasattr(module, k)}
  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.multiple(module, **kernels))
    for part in model.modules():
      if run := RUNS.get(type(part).__name__):
        stack.enter_context(mock.patch.object(part, 'forward', run(part)))
      if hasattr(part, '_use_fused_qkv_conv'):
        patch = mock.patch.object(
          part, '_use_fused_qkv_conv', lambda **_: False
        )
        stack.enter_context(patch)
    return model(tokens, use_cache=False).logits
