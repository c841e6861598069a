"""The weights of each block of Hugging Face transformers, by our names.

Imported after `pytest.importorskip('torch')`. Where the two differ by choice
the configuration makes the difference vanish, and says so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch

from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.ops.recurrent.mlstm import mlstm
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


def mlstm_layer() -> Pair:
  """The layer of xLSTM-7B around our op and norm.

  Our mixer is the block of the paper: it has a convolution, block-diagonal
  q, k, v and a skip, which this later layer dropped.
  """
  hf = modeling('xlstm')

  config = hf.xLSTMConfig(
    hidden_size=D,
    num_hidden_layers=1,
    num_heads=N,
    chunk_size=16,
    gate_soft_cap=2.0,
    eps=0.0,  # added to the denominator; the paper's has none
    norm_eps=1e-5,
  )
  theirs = hf.xLSTMLayer(config)
  w = randomize(theirs, multihead_norm=1.0, **{'fgate_preact.bias': 2.0})
  norm = HeadLayerNorm(N, D // N, bias=False)
  put(norm.scale, w['multihead_norm.weight'])

  def project(name, x, *shape):
    y = x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0)
    return y.reshape(*x.shape[:2], *shape)

  def ours(x, context=None, cache=None):
    cap = config.gate_soft_cap
    input_gate, forget = (
      cap * jnp.tanh(project(f'{name}gate_preact', x, N) / cap)
      for name in ('i', 'f')
    )
    h, state = mlstm(
      *(project(name, x, N, -1) for name in 'qkv'),
      input_gate,
      jax.nn.log_sigmoid(forget),
      segment_ids=context and context.segment_ids,
      initial_state=cache,
      chunk_size=8,
    )
    h = norm(h).reshape(x.shape)
    y = jax.nn.sigmoid(project('ogate_preact', x, D)) * h
    return project('out_proj', y, D), None if cache is None else state

  def init_cache(batch, max_len, dtype):
    shape = (batch, N, D // 2 // N, D // N)
    return tuple(jnp.zeros(shape[:rank]) for rank in (4, 3, 2))

  def run(x, cache=None):
    y, state = theirs(x, cache['state'] if cache else None)
    if cache is not None:
      cache['state'] = state
    return y

  ours.init_cache = init_cache
  return Pair(ours, run, dict)


BLOCKS = {
  f.__name__: functools.cache(f)
  for f in (
    gated_deltanet,
    kda,
    lightning,
    rwkv4,
    rg_lru,
    recurrent_gemma,
    mlstm_layer,
  )
}
