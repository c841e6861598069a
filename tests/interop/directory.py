"""A tiny directory of Llama weights, written without our code."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

WORDS = dict(
  model_type='llama',
  vocab_size=256,
  hidden_size=8,
  intermediate_size=12,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
  dtype='float32',
)


def tensors(words=WORDS, **others) -> dict[str, np.ndarray]:
  """Returns random tensors by the names of the files."""
  words = words | others
  random = np.random.default_rng(0)
  D, F, V = (
    words[k] for k in ('hidden_size', 'intermediate_size', 'vocab_size')
  )
  kv = D // words['num_attention_heads'] * words['num_key_value_heads']
  shapes = {
    'model.embed_tokens.weight': (V, D),
    'model.norm.weight': (D,),
    'lm_head.weight': (V, D),
  }
  for i in range(words['num_hidden_layers']):
    of_layer = {
      'self_attn.q_proj': (D, D),
      'self_attn.k_proj': (kv, D),
      'self_attn.v_proj': (kv, D),
      'self_attn.o_proj': (D, D),
      'mlp.gate_proj': (F, D),
      'mlp.up_proj': (F, D),
      'mlp.down_proj': (D, F),
      'input_layernorm': (D,),
      'post_attention_layernorm': (D,),
    }
    for name, shape in of_layer.items():
      shapes[f'model.layers.{i}.{name}.weight'] = shape
  return {
    name: random.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(path: pathlib.Path, found=None, **others) -> pathlib.Path:
  """Writes config.json, with other words, and the tensors."""
  words = {k: v for k, v in (WORDS | others).items() if v != '-'}
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text(json.dumps(words))
  save_file(tensors() if found is None else found, path / 'model.safetensors')
  return path
