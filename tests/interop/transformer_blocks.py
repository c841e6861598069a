"""The weights of whole blocks of ViT, BERT and GPT-2, by our names.

Imported after `pytest.importorskip('torch')`. All have biases on all
projections; the eps of their norms is set to ours.
"""

import functools

import numpy as np
import torch
from flax import nnx

from efficient_attn.config import ViTConfig
from efficient_attn.layers.block import Block
from efficient_attn.layers.context import Context
from tests.interop.pairs import D, N, Pair, put, randomize

EPS = 1e-6


def block(activation: str, norm_position: str, causal: bool) -> Block:
  config = ViTConfig(
    d_model=D,
    num_heads=N,
    norm='layernorm',
    norm_position=norm_position,
    ffn='mlp',
    ffn_bias=True,
    activation=activation,
    mixers={'attention': dict(position='none', qkv_bias=True, out_bias=True)},
  )

  def build():
    return Block(config, 'attention', causal, rngs=nnx.Rngs(0))

  return nnx.eval_shape(build)


def pair(ours: Block, theirs, parts: dict[str, str], w) -> Pair:
  """Sets the parts of ours from the layers of theirs, torch's [out, in]."""
  for name, layer in parts.items():
    module = functools.reduce(getattr, name.split('.'), ours)
    weight, bias = w[f'{layer}.weight'], w[f'{layer}.bias']
    put(module.scale if weight.ndim == 1 else module.weight, weight.T)
    put(module.bias, bias)

  def run(x):
    y, cache, _ = ours(x, Context(), None, None, None)
    return y, cache

  return Pair(run, theirs, lambda: None)


def vit() -> Pair:
  from transformers.models.vit import modeling_vit as hf

  config = hf.ViTConfig(
    hidden_size=D,
    num_attention_heads=N,
    intermediate_size=4 * D,
    layer_norm_eps=EPS,
    attn_implementation='eager',
  )
  theirs = hf.ViTLayer(config).eval()
  w = randomize(theirs, layernorm=1.0)
  ours = block('gelu', 'pre', causal=False)
  parts = {
    'mixer_norm': 'layernorm_before',
    'mixer.qkv.query': 'attention.q_proj',
    'mixer.qkv.key': 'attention.k_proj',
    'mixer.qkv.value': 'attention.v_proj',
    'mixer.out': 'attention.o_proj',
    'ffn_norm': 'layernorm_after',
    'ffn.up': 'mlp.fc1',
    'ffn.down': 'mlp.fc2',
  }
  return pair(ours, theirs, parts, w)


def bert() -> Pair:
  from transformers.models.bert import modeling_bert as hf

  config = hf.BertConfig(
    hidden_size=D,
    num_attention_heads=N,
    intermediate_size=4 * D,
    layer_norm_eps=EPS,
    attn_implementation='eager',
  )
  theirs = hf.BertLayer(config).eval()
  w = randomize(theirs)
  ours = block('gelu', 'post', causal=False)
  parts = {
    'mixer.qkv.query': 'attention.self.query',
    'mixer.qkv.key': 'attention.self.key',
    'mixer.qkv.value': 'attention.self.value',
    'mixer.out': 'attention.output.dense',
    'mixer_norm': 'attention.output.LayerNorm',
    'ffn.up': 'intermediate.dense',
    'ffn.down': 'output.dense',
    'ffn_norm': 'output.LayerNorm',
  }
  return pair(ours, theirs, parts, w)


def gpt2() -> Pair:
  """Their projections are [in, out], and one has queries, keys and values."""
  from transformers.models.gpt2 import modeling_gpt2 as hf

  config = hf.GPT2Config(
    n_embd=D, n_head=N, layer_norm_epsilon=EPS, attn_implementation='eager'
  )
  theirs = hf.GPT2Block(config, layer_idx=0).eval()
  w = randomize(theirs, ln=1.0)
  w = {name: a.T for name, a in w.items()}
  for part in ('weight', 'bias'):
    heads = np.split(w[f'attn.c_attn.{part}'], 3)
    w |= {f'{n}.{part}': a for n, a in zip('qkv', heads, strict=True)}
  ours = block('gelu_tanh', 'pre', causal=True)
  parts = {
    'mixer_norm': 'ln_1',
    'mixer.qkv.query': 'q',
    'mixer.qkv.key': 'k',
    'mixer.qkv.value': 'v',
    'mixer.out': 'attn.c_proj',
    'ffn_norm': 'ln_2',
    'ffn.up': 'mlp.c_fc',
    'ffn.down': 'mlp.c_proj',
  }

  def run(x):
    length = x.shape[1]
    later = torch.full((length, length), -torch.inf).triu(1)
    return theirs(x, attention_mask=later[None, None])

  return pair(ours, run, parts, w)


BLOCKS = {f.__name__: f for f in (vit, bert, gpt2)}
