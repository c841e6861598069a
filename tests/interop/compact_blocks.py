"""The weights of softmax blocks of Hugging Face transformers, by our names.

Imported after `pytest.importorskip('torch')`. Their layers take the angles and
the mask from the model around them; `attention_pair` is that model.
"""

import functools

import numpy as np
import torch
from transformers import DynamicCache

from tests.interop.pairs import (
  D,
  N,
  Pair,
  build,
  into,
  modeling,
  put,
  randomize,
)

COMMON = dict(
  hidden_size=D,
  num_hidden_layers=1,
  num_attention_heads=N,
  rope_parameters=dict(rope_type='default', rope_theta=10_000.0),
  attn_implementation='eager',
)


def attention_pair(ours, theirs, config, rotary) -> Pair:
  theirs.eval()

  def run(x, cache=None):
    past = cache.get_seq_length() if cache is not None else 0
    length = x.shape[1]
    positions = past + torch.arange(length)[None]
    keys = torch.arange(past + length)
    mask = torch.where(keys > positions[0][:, None], -torch.inf, 0.0)
    return theirs(
      x,
      position_embeddings=rotary(x, positions),
      attention_mask=mask[None, None],
      past_key_values=cache,
    )[0]

  return Pair(ours, run, lambda: DynamicCache(config=config))


def latent(
  hf, layer, interleaved=False, q_rank=12, position='rotary', **options
) -> Pair:
  """MLA; theirs may rotate neighbouring channels, ours the two halves."""
  nope, rope, value, kv_rank = 8, 4, 10, 14
  prefix = layer.__name__.removesuffix('Attention')
  config = getattr(hf, f'{prefix}Config')(
    **COMMON,
    num_key_value_heads=N,
    q_lora_rank=q_rank or None,
    kv_lora_rank=kv_rank,
    qk_nope_head_dim=nope,
    qk_rope_head_dim=rope,
    v_head_dim=value,
    **options,
  )
  theirs = layer(config, layer_idx=0)
  w = randomize(theirs, q_a_layernorm=1.0, kv_a_layernorm=1.0)
  ours = build(
    'mla',
    nope_dim=nope,
    rope_dim=rope,
    value_dim=value,
    q_rank=q_rank,
    kv_rank=kv_rank,
    position=position,
  )

  def halves(rows):  # the even channels, then the odd ones
    order = np.arange(rope)
    if interleaved:
      order = order.reshape(-1, 2).T.reshape(-1)
    return rows[..., order, :]

  if q_rank:
    put(ours.query_down.weight, w['q_a_proj.weight'].T)
    put(ours.query_norm.scale, w['q_a_layernorm.weight'])
  q = w['q_b_proj.weight' if q_rank else 'q_proj.weight']
  q = q.reshape(N, nope + rope, -1)
  q = np.concatenate([q[:, :nope], halves(q[:, nope:])], axis=1)
  put(ours.query_up.weight, into(q))
  down, rotary_key = np.split(w['kv_a_proj_with_mqa.weight'], [kv_rank])
  put(ours.kv_down.weight, down.T)
  put(ours.rotary_key.weight, halves(rotary_key).T)
  put(ours.kv_norm.scale, w['kv_a_layernorm.weight'])
  up = w['kv_b_proj.weight'].reshape(N, nope + value, kv_rank)
  put(ours.key_up.weight, into(up[:, :nope]))
  put(ours.value_up.weight, into(up[:, nope:]))
  put(ours.out.weight, w['o_proj.weight'].T)
  rotary = none
  if position == 'rotary':
    rotary = getattr(hf, f'{prefix}RotaryEmbedding')(config)
  return attention_pair(ours, theirs, config, rotary)


def none(x, positions):
  """The angles of a model without positions."""


def kimi_mla() -> Pair:
  hf = modeling('kimi_linear')

  return latent(
    hf,
    hf.KimiLinearAttention,
    q_rank=0,
    position='none',
    layer_types=['full_attention'],
  )


def deepseek_v2() -> Pair:
  from transformers.models.deepseek_v2 import modeling_deepseek_v2 as hf

  return latent(hf, hf.DeepseekV2Attention, interleaved=True)


def deepseek_v3() -> Pair:
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

  return latent(hf, hf.DeepseekV3Attention, interleaved=True)


def minicpm3() -> Pair:
  from transformers.models.minicpm3 import modeling_minicpm3 as hf

  return latent(hf, hf.MiniCPM3Attention)


def put_heads(ours, w, query='q_proj') -> None:
  """Sets the four projections of an `attention`."""
  put(ours.qkv.query.weight, w[f'{query}.weight'].T)
  put(ours.qkv.key.weight, w['k_proj.weight'].T)
  put(ours.qkv.value.weight, w['v_proj.weight'].T)
  put(ours.out.weight, w['o_proj.weight'].T)


def diffllama() -> Pair:
  """Their heads of the two maps are N / 2 apart, and so are the values'."""
  from transformers.models.diffllama import modeling_diffllama as hf

  config = hf.DiffLlamaConfig(**COMMON | dict(num_attention_heads=2 * N))
  theirs = hf.DiffLlamaAttention(config, layer_idx=0)
  w = randomize(theirs)
  ours = build('differential', lambda_init=theirs.lambda_init)
  width = D // N // 2

  def pairs(rows):  # (half, head) -> (head, half)
    return rows.reshape(2, N, width, D).swapaxes(0, 1).reshape(D, D)

  for name in 'qkv':
    w[f'{name}_proj.weight'] = pairs(w[f'{name}_proj.weight'])
  put_heads(ours, w)
  for name in ('lambda_q1', 'lambda_k1', 'lambda_q2', 'lambda_k2'):
    put(getattr(ours.weights, name), w[name])
  put(ours.weights.norm.scale, np.ones(D // N))  # theirs has none
  rotary = hf.DiffLlamaRotaryEmbedding(config)
  return attention_pair(ours, theirs, config, rotary)


def mfa() -> Pair:
  """One wide head of keys and values; theirs has the product of the factors."""
  from transformers.models.llama import modeling_llama as hf

  head_dim, rank = 2 * D // N, 5
  config = hf.LlamaConfig(**COMMON, num_key_value_heads=1, head_dim=head_dim)
  theirs = hf.LlamaAttention(config, layer_idx=0)
  w = randomize(theirs)
  ours = build('mfa', q_rank=rank)
  generator = np.random.default_rng(0)
  down = generator.standard_normal((D, rank)).astype(np.float32) / D**0.5
  up = generator.standard_normal((rank, N * head_dim)).astype(np.float32)
  theirs.q_proj.weight.data = torch.from_numpy((down @ up).T)
  put(ours.query.down.weight, down)
  put(ours.query.up.weight, up)
  put(ours.key.weight, w['k_proj.weight'].T)
  put(ours.value.weight, w['v_proj.weight'].T)
  put(ours.out.weight, w['o_proj.weight'].T)
  rotary = hf.LlamaRotaryEmbedding(config)
  return attention_pair(ours, theirs, config, rotary)


def gpt_oss() -> Pair:
  from transformers.models.gpt_oss import modeling_gpt_oss as hf

  config = hf.GptOssConfig(
    **COMMON,
    num_key_value_heads=2,
    head_dim=D // N,
    attention_bias=False,  # theirs has biases, ours none
    layer_types=['full_attention'],
  )
  theirs = hf.GptOssAttention(config, layer_idx=0)
  w = randomize(theirs)
  ours = build('attention', num_kv_heads=2, sinks=True)
  put_heads(ours, w)
  put(ours.weights.sinks, w['sinks'])
  rotary = hf.GptOssRotaryEmbedding(config)
  return attention_pair(ours, theirs, config, rotary)


def qwen3_next() -> Pair:
  """Their scales are the differences from 1."""
  hf = modeling('qwen3_next')

  config = hf.Qwen3NextConfig(
    **COMMON
    | dict(
      num_key_value_heads=2,
      head_dim=D // N,
      layer_types=['full_attention'],
      rope_parameters=COMMON['rope_parameters']
      | dict(partial_rotary_factor=0.25),
    )
  )
  theirs = hf.Qwen3NextAttention(config, layer_idx=0)
  w = randomize(theirs)
  ours = build(
    'attention',
    num_kv_heads=2,
    qk_norm=True,
    gate='channel',
    rotary=dict(fraction=0.25),
  )
  query = w['q_proj.weight'].reshape(N, 2, D // N, D)
  w['q_proj.weight'] = query[:, 0].reshape(D, D)
  put_heads(ours, w)
  put(ours.gate.weight, into(query[:, 1]))
  put(ours.query_norm.scale, 1 + w['q_norm.weight'])
  put(ours.key_norm.scale, 1 + w['k_norm.weight'])
  rotary = hf.Qwen3NextRotaryEmbedding(config)
  return attention_pair(ours, theirs, config, rotary)


BLOCKS = {
  f.__name__: functools.cache(f)
  for f in (
    deepseek_v2,
    deepseek_v3,
    diffllama,
    gpt_oss,
    kimi_mla,
    mfa,
    minicpm3,
    qwen3_next,
  )
}
