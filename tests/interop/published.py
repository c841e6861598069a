"""Small models of each family, as transformers makes and saves them.

Imported after `pytest.importorskip('torch')`. Every parameter is random, so
that no zero of an initialisation hides a mistake.
"""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
  MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tests.interop.pairs import hidden

V = 97
TINY = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  rms_norm_eps=1e-3,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
LLAMA3 = dict(
  rope_type='llama3',
  rope_theta=1e4,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
GPT2 = dict(
  vocab_size=V,
  n_embd=32,
  n_layer=3,
  n_head=4,
  n_positions=64,
  layer_norm_epsilon=1e-3,
  bos_token_id=None,
  eos_token_id=None,
)
GEMMA = TINY | dict(
  head_dim=16, query_pre_attn_scalar=24, sliding_window=7, pad_token_id=0
)
NEOX = dict(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=2,
  max_position_embeddings=64,
  layer_norm_eps=1e-3,
  bos_token_id=None,
  eos_token_id=None,
)
FALCON = dict(
  vocab_size=V,
  hidden_size=32,
  num_hidden_layers=3,
  num_attention_heads=4,
  ffn_hidden_size=40,
  layer_norm_epsilon=1e-3,
  bos_token_id=None,
  eos_token_id=None,
)
BLOOM = dict(
  vocab_size=V,
  hidden_size=36,
  n_layer=3,
  n_head=4,
  layer_norm_epsilon=1e-3,
  bos_token_id=None,
  eos_token_id=None,
)

YARN = dict(
  rope_type='yarn',
  rope_theta=1e4,
  factor=4.0,
  original_max_position_embeddings=16,
)
EXPERTS = TINY | dict(
  num_local_experts=6, num_experts_per_tok=2, num_hidden_layers=2
)
LATENT = TINY | dict(
  num_key_value_heads=4,
  q_lora_rank=12,
  kv_lora_rank=14,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=10,
)
DEEPSEEK = LATENT | dict(
  n_routed_experts=8,
  num_experts_per_tok=3,
  moe_intermediate_size=12,
  n_shared_experts=2,
  first_k_dense_replace=1,
)
SHORT, LONG = [1.0, 1.2], [2.0, 3.0]

# Name of a case, which begins with its model_type -> words of its config.
CASES = {
  'llama': TINY,
  'llama-scaled': TINY
  | dict(
    rope_parameters=LLAMA3,
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=True,
    head_dim=16,
  ),
  'llama-linear': TINY
  | dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=4.0)),
  'llama-dynamic': TINY
  | dict(
    max_position_embeddings=8,
    rope_parameters=dict(rope_type='dynamic', rope_theta=1e4, factor=2.0),
  ),
  'mistral': TINY | dict(sliding_window=7, head_dim=16),
  'mistral-full': TINY | dict(sliding_window=None),
  'qwen2': TINY
  | dict(
    use_sliding_window=True,
    sliding_window=7,
    max_window_layers=1,
    rope_parameters=dict(
      rope_type='yarn',
      rope_theta=1e4,
      factor=4.0,
      original_max_position_embeddings=16,
    ),
  ),
  'qwen2-tied': TINY | dict(tie_word_embeddings=True, num_hidden_layers=2),
  'qwen3': TINY | dict(head_dim=16, attention_bias=True),
  'gpt2': GPT2,
  'gpt2-unscaled': GPT2 | dict(scale_attn_weights=False, n_inner=40),
  'smollm3': TINY | dict(num_hidden_layers=5, no_rope_layer_interval=2),
  'smollm3-window': TINY
  | dict(
    num_hidden_layers=4,
    no_rope_layers=[1, 0, 0, 1],
    use_sliding_window=True,
    sliding_window=7,
    tie_word_embeddings=False,
  ),
  'gemma2': GEMMA
  | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  'gemma3_text': GEMMA
  | dict(
    layer_types=['sliding_attention', 'full_attention', 'sliding_attention'],
    rope_parameters=dict(
      sliding_attention=dict(rope_type='default', rope_theta=1e3),
      full_attention=dict(rope_type='linear', rope_theta=1e4, factor=8.0),
    ),
  ),
  'olmo2': TINY,
  'olmo3': TINY
  | dict(
    num_hidden_layers=5,
    sliding_window=7,
    rope_parameters=dict(
      sliding_attention=dict(rope_type='default', rope_theta=1e3),
      full_attention=dict(
        rope_type='yarn',
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  'gpt_neox': NEOX,
  'gpt_neox-sequential': NEOX
  | dict(use_parallel_residual=False, attention_bias=False),
  'falcon-7b': FALCON,
  'falcon-40b': FALCON | dict(new_decoder_architecture=True, num_kv_heads=2),
  'falcon-one_norm': FALCON
  | dict(
    new_decoder_architecture=True,
    num_kv_heads=2,
    num_ln_in_parallel_attn=1,
    bias=True,
  ),
  'falcon-rw': FALCON
  | dict(multi_query=False, parallel_attn=False, alibi=True, bias=True),
  'diffllama': TINY,
  'diffllama-bias': TINY
  | dict(attention_bias=True, num_key_value_heads=4, head_dim=16),
  'bloom': BLOOM,
  'bloom-normed': BLOOM
  | dict(apply_residual_connection_post_layernorm=True, n_head=6),
  'mixtral': EXPERTS,
  'mixtral-window': EXPERTS | dict(sliding_window=7, num_hidden_layers=1),
  'qwen3_moe': EXPERTS
  | dict(
    num_hidden_layers=5,
    decoder_sparse_step=2,
    moe_intermediate_size=12,
    head_dim=16,
  ),
  'qwen3_moe-dense': EXPERTS
  | dict(mlp_only_layers=[0], norm_topk_prob=True, moe_intermediate_size=12),
  'olmoe': TINY | dict(num_experts=6, num_experts_per_tok=3),
  'gpt_oss': EXPERTS
  | dict(
    head_dim=16,
    sliding_window=7,
    num_hidden_layers=3,
    swiglu_limit=0.5,
    rope_parameters=YARN | dict(truncate=False),
  ),
  'deepseek_v2': DEEPSEEK
  | dict(
    n_group=4,
    topk_group=2,
    topk_method='group_limited_greedy',
    routed_scaling_factor=1.5,
    rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=0.6),
  ),
  'deepseek_v2-lite': DEEPSEEK
  | dict(q_lora_rank=None, n_group=2, topk_group=1, first_k_dense_replace=0),
  'deepseek_v3': DEEPSEEK | dict(n_group=4, topk_group=2, rope_parameters=YARN),
  'deepseek_v3-halves': DEEPSEEK
  | dict(
    n_group=1,
    topk_group=1,
    rope_interleave=False,
    norm_topk_prob=False,
    num_hidden_layers=2,
  ),
  'minicpm3': LATENT
  | dict(
    rope_parameters=dict(
      rope_type='longrope',
      rope_theta=1e4,
      short_factor=SHORT,
      long_factor=LONG,
      original_max_position_embeddings=16,
    )
  ),
}


def make_config(model_type: str, words: dict):
  """Returns a config of transformers' own class.

  AutoConfig gives that of another package, once that is imported.
  """
  return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])(**words)


def make(case: str, words: dict | None = None) -> torch.nn.Module:
  """Returns a random model in float32, of CASES unless words are given."""
  torch.manual_seed(0)
  model_type = case.partition('-')[0]
  kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
  with hidden('fla', 'xlstm'):  # what runs is their PyTorch
    config = make_config(model_type, CASES[case] if words is None else words)
  # Eager code adds the ALiBi of Falcon twice.
  eager = model_type != 'falcon'
  config._attn_implementation = 'eager' if eager else 'sdpa'
  model = kind(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
    for name, p in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        p.add_(0.1 * torch.randn_like(p))
  return model.float()
