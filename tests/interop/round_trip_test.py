"""A small model of each family comes back as it was saved, without PyTorch."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('safetensors')

from flax import nnx

from efficient_attn import interop
from efficient_attn.config import Config
from efficient_attn.interop.convert import written_words
from efficient_attn.interop.family import differences
from efficient_attn.models import abstract

TINY = dict(
  vocab_size=19,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
)
KV = TINY | dict(num_key_value_heads=2)
MAMBA = dict(vocab_size=19, hidden_size=16, num_hidden_layers=2, state_size=4)
FLA = dict(
  vocab_size=19,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_heads=2,
)
HEADS = FLA | dict(head_dim=4, expand_v=1.5)
HYBRID = dict(attn=dict(layers=[1], num_heads=4, window_size=5))

MOE = KV | dict(num_experts_per_tok=2, num_local_experts=3)
MLA = TINY | dict(
  q_lora_rank=6,
  kv_lora_rank=7,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=5,
)
DEEPSEEK = MLA | dict(
  n_routed_experts=4,
  num_experts_per_tok=2,
  moe_intermediate_size=6,
  n_shared_experts=1,
  n_group=2,
  topk_group=1,
  first_k_dense_replace=1,
)

# A config.json by hand for each family.
WORDS = {
  'llama': KV,
  'mistral': KV | dict(sliding_window=5),
  'qwen2': KV,
  'qwen3': KV | dict(head_dim=8),
  'smollm3': KV | dict(no_rope_layers=[1, 0, 1]),
  'gemma2': KV | dict(head_dim=8, query_pre_attn_scalar=8),
  'gemma3_text': KV | dict(head_dim=8, query_pre_attn_scalar=8),
  'olmo2': KV,
  'olmo3': KV,
  'gpt2': dict(vocab_size=19, n_embd=16, n_layer=2, n_head=4, n_positions=8),
  'gpt_neox': TINY,
  'falcon': {k: v for k, v in TINY.items() if k != 'intermediate_size'},
  'bloom': dict(vocab_size=19, hidden_size=16, n_layer=2, n_head=4),
  'diffllama': KV,
  'mamba': MAMBA,
  'mamba2': MAMBA | dict(num_heads=4, head_dim=8, n_groups=2),
  'falcon_mamba': MAMBA,
  'rwkv': dict(vocab_size=19, hidden_size=16, num_hidden_layers=2),
  'recurrent_gemma': KV | dict(attention_window_size=5),
  'lfm2': KV | dict(layer_types=['conv', 'full_attention', 'conv']),
  'xlstm': dict(
    vocab_size=19, hidden_size=16, num_hidden_layers=2, num_heads=2
  ),
  'falcon_h1': KV
  | dict(mamba_d_ssm=24, mamba_n_heads=6, mamba_d_head=4, mamba_d_state=4),
  'jamba': KV
  | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=3)
  | dict(mamba_dt_rank=3),
  'qwen3_next': KV
  | dict(
    num_hidden_layers=4,
    head_dim=8,
    linear_key_head_dim=3,
    linear_value_head_dim=5,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    shared_expert_intermediate_size=7,
  ),
  'kimi_linear': TINY
  | dict(
    num_key_value_heads=4,
    layer_types=['linear_attention', 'full_attention', 'linear_attention'],
    mlp_layer_types=['dense', 'sparse', 'sparse'],
    linear_num_heads=2,
    linear_head_dim=6,
    kv_lora_rank=7,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=5,
    num_experts=4,
    num_experts_per_token=2,
    num_expert_group=2,
    topk_group=1,
    moe_intermediate_size=6,
    num_shared_experts=1,
  ),
  'mixtral': MOE,
  'qwen3_moe': MOE | dict(moe_intermediate_size=6, decoder_sparse_step=2),
  'olmoe': KV | dict(num_experts=3, num_experts_per_tok=2),
  'gpt_oss': MOE | dict(head_dim=8, sliding_window=5),
  'deepseek_v2': DEEPSEEK | dict(topk_method='group_limited_greedy'),
  'deepseek_v3': DEEPSEEK,
  'minicpm3': MLA,
  'minimax': MOE,
  'comba': HEADS | HYBRID,
  'delta_net': FLA | HYBRID,
  'gated_deltanet': HEADS | dict(num_v_heads=4),
  'gated_deltaproduct': HEADS | HYBRID | dict(num_householder=2),
  'gla': FLA | HYBRID | dict(use_short_conv=True),
  'gsa': FLA | HYBRID | dict(num_slots=3),
  'hgrn2': FLA | HYBRID | dict(use_lower_bound=False, expand_ratio=8),
  'kda': HEADS | HYBRID,
  'retnet': FLA | HYBRID,
}


def random_model(config):
  """Returns a model of random arrays, for which nothing is compiled."""
  graph, state = nnx.split(abstract(config))
  draw = np.random.default_rng(0)
  state = jax.tree.map(
    lambda x: draw.standard_normal(x.shape).astype(np.float32), state
  )
  return nnx.merge(graph, state)


def arrays(model):
  state = nnx.split(model)[1]
  return {k: np.asarray(p[...]) for k, p in nnx.to_flat_state(state)}


@pytest.mark.parametrize('name', interop.FAMILIES)
def test_a_model_comes_back(name, tmp_path):
  words = WORDS[name]
  config = interop.FAMILIES[name].read(words)
  model = random_model(config)
  (tmp_path / 'source').mkdir()
  said = json.dumps(words | {'model_type': name})
  (tmp_path / 'source' / 'config.json').write_text(said)
  interop.save(
    Config(model=config),
    model,
    tmp_path / 'saved',
    source=tmp_path / 'source',
  )
  found, again = interop.load(tmp_path / 'saved', scan_layers=True)
  assert not differences(found.model, config)
  wanted, found = arrays(model), arrays(again)
  assert found.keys() == wanted.keys()
  for key, value in wanted.items():
    np.testing.assert_array_equal(found[key], value, strict=True)


@pytest.mark.parametrize('name', interop.FAMILIES)
def test_words_come_back(name):
  family = interop.FAMILIES[name]
  config = family.read(WORDS[name])
  assert not differences(family.read(family.write(config)), config)


@pytest.mark.parametrize('name', interop.FAMILIES)
def test_a_family_is_found(name):
  config = interop.FAMILIES[name].read(WORDS[name])
  found, words = written_words(config, {})
  assert not differences(interop.FAMILIES[found].read(words), config)
