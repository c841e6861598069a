"""Our additive mixers and layers of flash-linear-attention, as weights.

Imported after `pytest.importorskip('fla')`.
"""

from unittest import mock

import numpy as np
import torch
from torch.nn import functional

from tests.interop.fla_layers import (
  Conv,
  gated_norm,
  layer_pair,
  put_gated_output,
  put_qkv,
  reference,
  rms,
)
from tests.interop.pairs import D, N, Pair, build, into, put, randomize

H = D // N


def linear_attention(ours, feature_map) -> tuple:
  """A layer of theirs, its weights, and the reference as its kernel."""
  from fla.layers.linear_attn import LinearAttention

  layer = LinearAttention(
    hidden_size=D,
    num_heads=N,
    feature_map=feature_map,
    output_norm='identity',
    do_feature_map_norm=True,
  )
  w = randomize(layer)
  put_qkv(ours, w)
  naive = reference('linear_attn.naive', 'naive_recurrent_linear_attn')

  def attend(q, k, v, normalize, **_):
    return naive(q, k, v, normalize=normalize)

  return layer, w, dict(chunk_linear_attn=attend)


def linear(length) -> Pair:
  ours = build('linear', chunk_size=16)
  layer, _, kernels = linear_attention(ours, 'elu')
  return layer_pair(ours, layer, **kernels)


def hedgehog(length) -> Pair:
  """Theirs doubles what it maps, and has biases and one map for all heads."""
  ours = build('hedgehog', chunk_size=16)
  layer, w, kernels = linear_attention(ours, 'hedgehog')
  for mine, name in zip(ours.maps, 'qk', strict=True):
    weight = w[f'feature_map_{name}.layer.weight']
    put(mine, np.tile(2 * weight.T, (N, 1, 1)))
    getattr(layer, f'feature_map_{name}').layer.bias.data.zero_()
  return layer_pair(ours, layer, **kernels)


def taylor_pair(ours, feature_dim, causal=True) -> Pair:
  from fla.layers.based import BasedLinearAttention

  sizes = dict(num_heads=N, num_key_value_heads=N, feature_dim=feature_dim)
  layer = BasedLinearAttention(D, **sizes, causal=causal)
  put_qkv(ours, randomize(layer))
  return Pair(ours, layer.forward_reference, dict)


def based(length) -> Pair:
  return taylor_pair(build('based', feature_dim=6, chunk_size=16), 6)


def qt_vit(length) -> Pair:
  """The expansion that its published map is a part of."""
  ours = build('qt_vit', compact=False, causal=False, chunk_size=16)
  return taylor_pair(ours, H, causal=False)


def rebased(length) -> Pair:
  """Theirs shares a norm of queries and keys, and adds 1e-5 to the sum."""
  from fla.layers.rebased import ReBasedLinearAttention
  from fla.modules import feature_map

  sizes = dict(num_heads=N, num_key_value_heads=N, feature_dim=6)
  layer = ReBasedLinearAttention(D, **sizes, eps=0.0)
  # Sums of squares that are not small: their inverses would round.
  w = randomize(layer, **{'feature_map': 1.0})
  ours = build('rebased', feature_dim=6, chunk_size=16)
  put_qkv(ours, w)
  for norm in ours.norms:
    put(norm.scale, w['feature_map.gamma'])
    put(norm.bias, w['feature_map.beta'])

  def layer_norm(x, weight, bias):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)

  def run(x):
    with mock.patch.object(feature_map, 'layer_norm', layer_norm):
      return layer.forward_reference(x)

  return Pair(ours, run, dict)


def recurrent_gla(q, k, v, gk, **_):
  return reference('gla.naive', 'naive_recurrent_gla')(q, k, v, gk)


def norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias, **_):
  x = functional.rms_norm(x, x.shape[-1:], norm_weight, 1e-5)
  return functional.linear(x, linear_weight, linear_bias)


def hgrn2(length) -> Pair:
  from fla.layers.hgrn2 import HGRN2Attention

  layer = HGRN2Attention(hidden_size=D, expand_ratio=H, layer_idx=0)
  w = randomize(layer, g_norm=1.0)
  ours = build('hgrn2', chunk_size=16)
  for mine, name in (
    (ours.query, 'q'),
    (ours.forget, 'f'),
    (ours.value, 'i'),
    (ours.out, 'o'),
  ):
    put(mine.weight, into(w[f'{name}_proj.weight']))
  put(ours.norm.scale, w['g_norm.weight'])

  # The scale of GLA, which HGRN2's ops of theirs leave in, is 1 here.
  def gla(q, **x):
    return recurrent_gla(q * H**0.5, **x)

  return layer_pair(
    ours,
    layer,
    fused_recurrent_gla=gla,
    swish=functional.silu,
    rms_norm_linear=norm_linear,
  )


def gla(length) -> Pair:
  from fla.layers.gla import GatedLinearAttention

  layer = GatedLinearAttention(hidden_size=D, num_heads=N, layer_idx=0)
  w = randomize(layer, g_norm_swish_gate=1.0)
  gated_norm(layer.g_norm_swish_gate)
  ours = build('gla', chunk_size=16)
  for mine, name in (
    (ours.qkv.query, 'q_proj'),
    (ours.qkv.key, 'k_proj'),
    (ours.qkv.value, 'v_proj'),
    (ours.gate.down, 'gk_proj.0'),
    (ours.gate.up, 'gk_proj.1'),
  ):
    put(mine.weight, into(w[f'{name}.weight']))
  put(ours.gate.up.bias, w['gk_proj.1.bias'])
  put_gated_output(ours.out, w, 'g_norm_swish_gate')
  return layer_pair(ours, layer, fused_recurrent_gla=recurrent_gla)


def retention(length) -> Pair:
  from fla.layers.multiscale_retention import MultiScaleRetention
  from fla.modules.rotary.ops import rotary_embedding_ref

  layer = MultiScaleRetention(hidden_size=D, num_heads=N, layer_idx=0)
  w = randomize(layer, g_norm_swish_gate=1.0)
  gated_norm(layer.g_norm_swish_gate)
  angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, H, 2) / H)

  def rotate(q, k, **_):
    waves = angles.cos(), angles.sin()
    return tuple(rotary_embedding_ref(x, *waves) for x in (q, k))

  layer.rotary.forward = rotate
  ours = build('retention', chunk_size=16)
  for mine, name in (
    (ours.qkv.query, 'q'),
    (ours.qkv.key, 'k'),
    (ours.qkv.value, 'v'),
  ):
    put(mine.weight, into(w[f'{name}_proj.weight']))
  put_gated_output(ours.out, w, 'g_norm_swish_gate')
  naive = reference('retention.naive', 'naive_retention')

  def retain(q, k, v, **_):
    o = naive(*(x.transpose(1, 2) for x in (q, k, v)))
    return o.transpose(1, 2), None

  return layer_pair(ours, layer, chunk_retention=retain)


def gsa(length) -> Pair:
  from fla.layers.gsa import GatedSlotAttention

  slots = 5
  layer = GatedSlotAttention(
    hidden_size=D, num_heads=N, num_slots=slots, layer_idx=0
  )
  w = randomize(layer, g_norm=1.0)
  layer.feature_map = torch.nn.SiLU()
  ours = build('gsa', num_slots=slots, chunk_size=16)
  for mine, name in (
    (ours.query, 'q'),
    (ours.key, 'k'),
    (ours.value, 'v'),
    (ours.decay, 'f'),
    (ours.out, 'o'),
  ):
    put(mine.weight, into(w[f'{name}_proj.weight']))
  put(ours.norm.scale, w['g_norm.weight'])
  naive = reference('gsa.naive', 'naive_recurrent_gsa')

  def read(q, k, v, s, g, scale, **_):
    return naive(q, k, v, s, g, scale)

  return layer_pair(
    ours, layer, fused_recurrent_gsa=read, rms_norm_linear=norm_linear
  )


def rodimus(length) -> Pair:
  from fla.layers.rodimus import RodimusAttention

  layer = RodimusAttention(hidden_size=D, expand_ratio=10, layer_idx=0)
  w = randomize(layer, **{'activation_norm': 1.0})
  layer.short_conv = Conv(layer.short_conv)
  norm = layer.activation_norm
  norm.forward = lambda o, gate: rms(o * functional.silu(gate), norm)
  ours = build('rodimus', state_dim=10, chunk_size=16)
  for mine, name in (
    (ours.up, 'up_proj'),
    (ours.gate, 'gate_proj'),
    (ours.query, 'q_proj'),
    (ours.key, 'k_proj'),
    (ours.select, 'g_gate_proj'),
    (ours.temper, 'tau_gate_proj'),
    (ours.write_down, 'i_gate_proj.0'),
    (ours.write_up, 'i_gate_proj.1'),
    (ours.out, 'down_proj'),
  ):
    put(mine.weight, into(w[f'{name}.weight']))
    if mine.bias is not None:
      put(mine.bias, w[f'{name}.bias'])
  put(ours.conv.weight, into(w['short_conv.weight'][:, 0]))
  put(ours.conv.bias, w['short_conv.bias'])
  put(ours.skip, w['residual_weight'])
  put(ours.norm.scale, w['activation_norm.weight'])

  def chunk(q, k, v, g, **_):
    return recurrent_gla(q, k, v, g)

  return layer_pair(ours, layer, chunk_gla=chunk)


BLOCKS = {
  f.__name__: f
  for f in (
    based,
    gla,
    gsa,
    hedgehog,
    hgrn2,
    linear,
    qt_vit,
    rebased,
    retention,
    rodimus,
  )
}
