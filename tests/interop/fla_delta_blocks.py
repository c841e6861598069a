"""Our delta rules and RWKV and layers of flash-linear-attention, as weights.

Imported after `pytest.importorskip('fla')`.
"""

import numpy as np
import torch
from torch.nn import functional

from tests.interop.fla_layers import (
  gated_norm,
  layer_pair,
  plain_norm,
  put_all,
  put_convs,
  put_qkv,
  reference,
)
from tests.interop.pairs import D, N, Pair, build, into, put, randomize

H = D // N
RANK, DECAY_RANK = 5, 7


def unit(x):
  """Their l2 norm in the kernel."""
  return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def deltanet(length) -> Pair:
  from fla.layers.delta_net import DeltaNet

  layer = DeltaNet(hidden_size=D, num_heads=N, layer_idx=0)
  w = randomize(layer, o_norm=1.0)
  plain_norm(layer.o_norm)
  ours = build('deltanet', chunk_size=16)
  put_convs(layer, ours.qkv.convs, w, *'qkv')
  put_all(
    w,
    (ours.qkv.query, 'q_proj'),
    (ours.qkv.key, 'k_proj'),
    (ours.qkv.value, 'v_proj'),
    (ours.beta, 'b_proj'),
    (ours.out.out, 'o_proj'),
  )
  put(ours.out.norm.scale, w['o_norm.weight'])
  naive = reference('delta_rule.naive', 'delta_rule_recurrence')

  def rule(q, k, v, beta, **_):
    o, _ = naive(*(x.transpose(1, 2) for x in (unit(q), unit(k), v, beta)))
    return o.transpose(1, 2), None

  kernels = dict(chunk_delta_rule=rule, fused_recurrent_delta_rule=rule)
  return layer_pair(ours, layer, **kernels)


def deltaproduct(length) -> Pair:
  """The steps of a token come before its heads in theirs, after them here."""
  from fla.layers.gated_deltaproduct import GatedDeltaProduct

  steps = 2
  layer = GatedDeltaProduct(
    hidden_size=D,
    head_dim=H,
    num_heads=N,
    num_householder=steps,
    expand_v=1,
    allow_neg_eigval=True,
    layer_idx=0,
  )
  w = randomize(layer, o_norm=1.0, dt_bias=-2.0)
  gated_norm(layer.o_norm)
  ours = build('deltaproduct', num_steps=steps, chunk_size=16)

  def steps_last(rows):
    split = rows.reshape(steps, N, -1, *rows.shape[1:])
    return split.swapaxes(0, 1).reshape(rows.shape)

  for name in ('k_proj', 'v_proj', 'b_proj', 'k_conv1d', 'v_conv1d'):
    w[f'{name}.weight'] = steps_last(w[f'{name}.weight'])
  put_convs(layer, ours.qkv.convs, w, *'qkv')
  put_all(
    w,
    (ours.qkv.query, 'q_proj'),
    (ours.qkv.key, 'k_proj'),
    (ours.qkv.value, 'v_proj'),
    (ours.beta, 'b_proj'),
    (ours.gate.project, 'a_proj'),
    (ours.out.gate, 'g_proj'),
    (ours.out.out, 'o_proj'),
  )
  put(ours.gate.dt_bias, w['dt_bias'])
  put(ours.gate.a_log, w['A_log'])
  put(ours.out.norm.scale, w['o_norm.weight'])
  naive = reference(
    'gated_delta_product.naive', 'naive_recurrent_gated_delta_product'
  )

  def rule(q, k, v, g, beta, num_householder, **_):
    arrays = unit(q), unit(k), v, g, beta
    return naive(*arrays, H**-0.5, num_householder=num_householder)

  return layer_pair(ours, layer, chunk_gated_delta_product=rule)


def mesa(length) -> Pair:
  """Systems solved exactly there, and by conjugate gradients here."""
  from fla.layers.mesa_net import MesaNet

  layer = MesaNet(hidden_size=D, num_heads=N, head_dim=H, layer_idx=0)
  w = randomize(layer, o_norm=1.0)
  plain_norm(layer.o_norm)
  ours = build('mesa', chunk_size=16)
  put_convs(layer, (ours.query_conv, ours.key_conv), w, *'qk')
  put_all(
    w,
    (ours.query, 'q_proj'),
    (ours.key, 'k_proj'),
    (ours.value, 'v_proj'),
    (ours.forget, 'a_proj'),
    (ours.beta, 'b_proj'),
    (ours.out.out, 'o_proj'),
  )
  put(ours.ridge, w['lambda_params'])
  put(ours.out.norm.scale, w['o_norm.weight'])
  naive = reference('mesa_net.naive', 'naive_mesa_net_exact')

  def fit(q, k, v, g, beta, lamb, **_):
    return naive(unit(q), unit(k), v, g, lamb, beta)

  return layer_pair(ours, layer, chunk_mesa_net=fit)


def path(length) -> Pair:
  """Theirs scales the forget gates like the logits, so they are larger."""
  from fla.layers.path_attn import PaTHAttention

  layer = PaTHAttention(
    hidden_size=D, num_heads=N, use_forget_gate=True, layer_idx=0
  )
  w = randomize(layer)
  ours = build('path', forget_gate=True, chunk_size=16)
  put_convs(layer, (ours.conv,), w, 'w')
  put_qkv(ours, w)
  put_all(
    w,
    (ours.direction.down, 'w_proj.0'),
    (ours.direction.up, 'w_proj.1'),
    (ours.beta, 'bt_proj'),
    (ours.forget, 'g_proj'),
  )
  naive = reference('path_attn.naive', 'naive_path_attn')

  def attend(q, k, v, w, beta, g, **_):
    return naive(q, k, v, w, beta, g * H**0.5, H**-0.5, chunk_size=8), None

  return layer_pair(
    ours,
    layer,
    parallel_path_attn=attend,
    l2_norm=lambda x, **_: unit(x),
  )


def rwkv_pair(name, **ranks) -> tuple:
  """What RWKV-5 and 6 share, the layer of theirs and its weights."""
  from fla.layers.rwkv6 import RWKV6Attention

  layer = RWKV6Attention(
    hidden_size=D,
    num_heads=N,
    expand_k=1.0,
    proj_low_rank_dim=RANK,
    gate_low_rank_dim=DECAY_RANK,
    layer_idx=0,
  )
  w = randomize(layer, **{'g_norm.weight': 1.0})
  norm = layer.g_norm

  def group_norm(o):
    groups = functional.group_norm(
      o.flatten(0, 1), N, norm.weight, norm.bias, 64e-5
    )
    return groups.view_as(o)

  norm.forward = group_norm
  layer.gate_fn = functional.silu
  ours = build(name, **ranks, chunk_size=16)
  put_all(
    w,
    (ours.receptance, 'r_proj.linear'),
    (ours.key, 'k_proj.linear'),
    (ours.value, 'v_proj.linear'),
    (ours.gate, 'g_proj.linear'),
    (ours.out, 'o_proj'),
  )
  put(ours.decay, w['w_proj.linear.lora.2.bias'])
  put(ours.bonus, w['bonus'])
  put(ours.norm.scale, w['g_norm.weight'])
  put(ours.norm.bias, w['g_norm.bias'])
  naive = reference('rwkv6.recurrent_naive', 'naive_recurrent_rwkv6')

  def mix(r, k, v, w, u, scale, **_):
    arrays = (x.transpose(1, 2) for x in (r, k, v, w))
    return naive(*arrays, u, scale)[0].transpose(1, 2), None

  def token_shift(x, *_):
    return functional.pad(x, (0, 0, 1, -1)) - x

  kernels = dict(fused_recurrent_rwkv6=mix, token_shift=token_shift)
  return layer_pair(ours, layer, **kernels), layer, w


def rwkv5(length) -> Pair:
  """RWKV-6 without the low ranks by which its shifts and decays see data."""
  pair, layer, w = rwkv_pair('rwkv5')
  layer.x_proj[2].weight.data.zero_()
  layer.w_proj.linear.lora[2].weight.data.zero_()
  put(pair.ours.shifts, w['x_bias'][[0, 2, 3, 4]])
  return pair


def rwkv6(length) -> Pair:
  pair, _, w = rwkv_pair('rwkv6', shift_rank=RANK, decay_rank=DECAY_RANK)
  ours = pair.ours
  put_all(
    w,
    (ours.shift_down, 'x_proj.0.linear'),
    (ours.decay_down, 'w_proj.linear.lora.0'),
  )
  put(ours.decay_up.weight, into(w['w_proj.linear.lora.2.weight']))
  # Theirs are r, w, k, v, g; ours r, k, v, g, w.
  order = [0, 2, 3, 4, 1]
  put(ours.shifts, np.stack([w['x_proj.0.mu'], *w['x_bias'][order]]))
  down = w['x_proj.0.linear.weight'].reshape(5, RANK, D)[order]
  put(ours.shift_down.weight, into(down))
  up = w['x_proj.2.weight'].reshape(D, 5, RANK)[:, order]
  put(ours.shift_up, np.moveaxis(up, 0, -1))
  return pair


BLOCKS = {
  f.__name__: f for f in (deltanet, deltaproduct, mesa, path, rwkv5, rwkv6)
}
