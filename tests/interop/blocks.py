"""The weights of each block of Hugging Face transformers, by our names.

Imported after `pytest.importorskip('torch')`. Where the two differ by choice
the configuration makes the difference vanish, and says so.
"""

import functools

import numpy as np
import torch

from tests.interop.pairs import (
  D,
  N,
  Pair,
  build,
  cached,
  into,
  modeling,
  put,
  randomize,
)


def gated_deltanet() -> Pair:
  """Two key heads that serve two value heads each, with Qwen3-Next's eps."""
  hf = modeling('qwen3_next')

  keys, key_dim, value_dim = 2, 6, 12
  config = hf.Qwen3NextConfig(
    hidden_size=D,
    num_hidden_layers=1,
    linear_num_key_heads=keys,
    linear_num_value_heads=N,
    linear_key_head_dim=key_dim,
    linear_value_head_dim=value_dim,
  )
  theirs = hf.Qwen3NextGatedDeltaNet(config, layer_idx=0)
  w = randomize(theirs, dt_bias=-2.0, norm=1.0)
  ours = build(
    'gated_deltanet',
    key_heads=keys,
    key_dim=key_dim,
    value_dim=value_dim,
    norm_eps=config.rms_norm_eps,
    chunk_size=16,
  )
  # One group of rows for each key head: q, k and the v and z it serves.
  each = N // keys * value_dim
  q, k, v, z = np.split(
    w['in_proj_qkvz.weight'].reshape(keys, -1, D),
    np.cumsum([key_dim, key_dim, each]),
    axis=1,
  )
  beta, decay = np.split(w['in_proj_ba.weight'].reshape(keys, -1, D), 2, axis=1)
  put(ours.qkv.query.weight, into(q))
  put(ours.qkv.key.weight, into(k))
  put(ours.qkv.value.weight, into(v))
  put(ours.beta.weight, into(beta))
  put(ours.gate.project.weight, into(decay))
  put(ours.out.gate.weight, into(z))
  taps = w['conv1d.weight'][:, 0]
  parts = np.split(taps, [keys * key_dim, 2 * keys * key_dim])
  for conv, a in zip(ours.qkv.convs, parts, strict=True):
    put(conv.weight, into(a))
  put(ours.gate.dt_bias, w['dt_bias'])
  put(ours.gate.a_log, w['A_log'])
  put(ours.out.norm.scale, w['norm.weight'])
  put(ours.out.out.weight, w['out_proj.weight'].T)
  return cached(ours, theirs, config)


def gated_conv() -> Pair:
  hf = modeling('lfm2')

  config = hf.Lfm2Config(
    hidden_size=D,
    num_hidden_layers=1,
    num_attention_heads=N,
    layer_types=['conv'],
    conv_L_cache=4,
    conv_bias=True,
  )
  theirs = hf.Lfm2ShortConv(config, layer_idx=0)
  w = randomize(theirs)
  ours = build('gated_conv', conv_width=4, bias=True)
  parts = ours.input_gate, ours.output_gate, ours.value
  for part in ('weight', 'bias'):
    rows = np.split(w[f'in_proj.{part}'], 3)
    for projection, a in zip(parts, rows, strict=True):
      put(getattr(projection, part), a.T)
    put(getattr(ours.conv, part), w[f'conv.{part}'].squeeze().T)
    put(getattr(ours.out, part), w[f'out_proj.{part}'].T)
  return cached(ours, theirs, config)


def lightning() -> Pair:
  """The second of three layers, in blocks of 8 tokens; ours in chunks of 16."""
  hf = modeling('minimax')

  layers, layer = 3, 1
  config = hf.MiniMaxConfig(
    hidden_size=D,
    num_attention_heads=N,
    num_hidden_layers=layers,
    layer_types=['linear_attention'] * layers,
    block_size=8,
  )
  theirs = hf.MiniMaxLightningAttention(config, layer_idx=layer).eval()
  w = randomize(theirs, norm=1.0)
  depth = layer / (layers - 1 + 1e-5)
  ours = build('lightning', chunk_size=16, depth=depth)
  rows = w['qkv_proj.weight'].reshape(N, 3, D // N, D)
  put(ours.qkv.query.weight, into(rows[:, 0]))
  put(ours.qkv.key.weight, into(rows[:, 1]))
  put(ours.qkv.value.weight, into(rows[:, 2]))
  put(ours.norm.scale, w['norm.weight'])
  put(ours.gate.weight, into(w['output_gate.weight']))
  put(ours.out.weight, into(w['out_proj.weight']))

  def run(x, cache=None):
    return theirs(x, None, None, cache)[0]

  return Pair(ours, run, hf.MiniMaxCache)


def kda() -> Pair:
  hf = modeling('kimi_linear')

  config = hf.KimiLinearConfig(
    hidden_size=D,
    num_hidden_layers=1,
    linear_num_heads=N,
    linear_head_dim=D // N,
  )
  theirs = hf.KimiLinearDeltaAttention(config, layer_idx=0)
  w = randomize(theirs, dt_bias=-2.0, o_norm=1.0)
  ours = build('kda', chunk_size=16)
  convs = np.split(w['conv1d.weight'][:, 0], 3)
  for name, projection, conv, taps in zip(
    'qkv',
    (ours.qkv.query, ours.qkv.key, ours.qkv.value),
    ours.qkv.convs,
    convs,
    strict=True,
  ):
    put(projection.weight, w[f'{name}_proj.weight'].T)
    put(conv.weight, taps.T)
  put(ours.beta.weight, w['b_proj.weight'].T)
  put(ours.gate.project.down.weight, w['forget_gate.f_a_proj.weight'].T)
  put(ours.gate.project.up.weight, w['forget_gate.f_b_proj.weight'].T)
  put(ours.gate.dt_bias, w['forget_gate.dt_bias'])
  put(ours.gate.a_log, w['forget_gate.A_log'])
  put(ours.out.gate.down.weight, w['g_a_proj.weight'].T)
  put(ours.out.gate.up.weight, w['g_b_proj.weight'].T)
  put(ours.out.norm.scale, w['o_norm.weight'])
  put(ours.out.out.weight, w['o_proj.weight'].T)
  return cached(ours, theirs, config)


def rwkv4() -> Pair:
  from transformers.models.rwkv import modeling_rwkv as hf

  config = hf.RwkvConfig(hidden_size=D, num_hidden_layers=1)
  theirs = hf.RwkvSelfAttention(config, layer_id=0).eval()
  w = randomize(theirs, time_decay=-1.0, time_mix=0.5)
  ours = build('rwkv4', chunk_size=16)
  for name in ('key', 'value', 'receptance'):
    put(getattr(ours, name).weight, w[f'{name}.weight'].T)
    put(getattr(ours, f'mix_{name}'), w[f'time_mix_{name}'])
  put(ours.rate, w['time_decay'])
  put(ours.bonus, w['time_first'])
  put(ours.out.weight, w['output.weight'].T)

  def run(x, cache=None):
    return theirs(x, state=cache, use_cache=cache is not None)[0]

  def new_cache():
    # Channel mixing's last token, ours, numerator, denominator and maximum;
    # with a state they take one row.
    state = [torch.zeros(1, D, 1) for _ in range(5)]
    state[4] -= 1e30
    return state

  return Pair(ours, run, new_cache)


def recurrent_block(first: int, **options) -> Pair:
  """The recurrent block of Griffin on tokens whose positions begin at `first`.

  Theirs lets the token at position 0 in unscaled.
  """
  from transformers.models.recurrent_gemma import modeling_recurrent_gemma as hf

  config = hf.RecurrentGemmaConfig(
    hidden_size=D, num_hidden_layers=1, num_attention_heads=N, lru_width=D
  )
  theirs = hf.RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
  w = randomize(theirs, **{'rg_lru.recurrent_param': -2.0})
  ours = build('rg_lru', expand=1, chunk_size=16, **options)
  for name, layer in (('x', ours.value), ('y', ours.gate), ('out', ours.out)):
    put(layer.weight, w[f'linear_{name}.weight'].T)
    if layer.bias is None:
      getattr(theirs, f'linear_{name}').bias.data.zero_()
    else:
      put(layer.bias, w[f'linear_{name}.bias'])
  put(ours.conv.weight, w['conv_1d.weight'][:, 0].T)
  put(ours.conv.bias, w['conv_1d.bias'])
  for gate, name in (
    (ours.input_gate, 'input_gate'),
    (ours.recurrence_gate, 'recurrent_gate'),
  ):
    put(gate.weight, w[f'rg_lru.{name}_weight'])
    put(gate.bias, w[f'rg_lru.{name}_bias'])
  put(ours.rate, w['rg_lru.recurrent_param'])

  def run(x, cache=None):
    start = first if cache is None else cache.pop()
    positions = start + torch.arange(x.shape[1])[None]
    if cache is not None:
      cache.append(start + x.shape[1])
    return theirs(x, positions, None, use_cache=cache is not None)[0]

  def new_cache():  # the state is in the module
    theirs._setup_cache(1, 'cpu', torch.float32)
    return [first]

  return Pair(ours, run, new_cache)


def rg_lru() -> Pair:
  """The paper's equations: no biases in the projections of the block."""
  return recurrent_block(1)


def recurrent_gemma() -> Pair:
  return recurrent_block(0, in_bias=True, out_bias=True, scale_first=False)


def xlstm_7b() -> Pair:
  """An eps that shows: theirs is 1e-6.

  They add it to a denominator that falls with gates below zero too, which
  ours does not; so here the largest input gate so far is above zero.
  """
  hf = modeling('xlstm')

  config = hf.xLSTMConfig(
    hidden_size=D,
    num_hidden_layers=1,
    num_heads=N,
    chunk_size=16,
    gate_soft_cap=4.0,
    eps=0.01,
    norm_eps=1e-5,
  )
  theirs = hf.xLSTMLayer(config)
  w = randomize(
    theirs,
    multihead_norm=1.0,
    **{'fgate_preact.bias': 2.0, 'igate_preact.bias': 8.0},
  )
  ours = build('xlstm_7b', gate_cap=4.0, eps=0.01, norm_eps=1e-5, chunk_size=16)
  for projection, name in (
    (ours.qkv.query, 'q'),
    (ours.qkv.key, 'k'),
    (ours.qkv.value, 'v'),
    (ours.gate, 'ogate_preact'),
    (ours.input_gate, 'igate_preact'),
    (ours.forget_gate, 'fgate_preact'),
    (ours.out, 'out_proj'),
  ):
    put(projection.weight, w[f'{name}.weight'].T)
  put(ours.input_bias, w['igate_preact.bias'])
  put(ours.forget_bias, w['fgate_preact.bias'])
  put(ours.norm.scale, w['multihead_norm.weight'])

  def run(x, cache=None):
    y, state = theirs(x, cache['state'] if cache else None)
    if cache is not None:
      cache['state'] = state
    return y

  return Pair(ours, run, dict)


BLOCKS = {
  f.__name__: functools.cache(f)
  for f in (
    gated_conv,
    gated_deltanet,
    kda,
    lightning,
    rwkv4,
    rg_lru,
    recurrent_gemma,
    xlstm_7b,
  )
}
