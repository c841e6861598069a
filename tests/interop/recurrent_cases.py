"""Small recurrent and hybrid models, as `published` has them."""

from tests.interop.published import TINY, V

MAMBA = dict(
  vocab_size=V,
  hidden_size=32,
  state_size=8,
  num_hidden_layers=3,
  layer_norm_epsilon=1e-3,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
MAMBA2 = MAMBA | dict(num_heads=8, head_dim=8, n_groups=1, chunk_size=8)

RWKV = dict(
  vocab_size=V,
  hidden_size=32,
  num_hidden_layers=3,
  rescale_every=0,
  bos_token_id=None,
  eos_token_id=None,
)

FALCON_H1 = TINY | dict(
  mamba_d_ssm=72,
  mamba_n_heads=6,
  mamba_d_head=12,
  mamba_d_state=8,
  mamba_chunk_size=8,
)

QWEN3_NEXT = TINY | dict(
  num_hidden_layers=4,
  head_dim=16,
  linear_key_head_dim=6,
  linear_value_head_dim=10,
  linear_num_key_heads=2,
  linear_num_value_heads=4,
  num_experts=6,
  num_experts_per_tok=2,
  moe_intermediate_size=12,
  shared_expert_intermediate_size=14,
)

# Name of a case, which begins with its model_type -> words of its config.
CASES = {
  'mamba': MAMBA,
  'mamba-biases': MAMBA
  | dict(
    use_bias=True,
    use_conv_bias=False,
    time_step_rank=3,
    expand=3,
    tie_word_embeddings=False,
  ),
  'falcon_mamba': MAMBA | dict(mixer_rms_eps=1e-2),
  'mamba2': MAMBA2,
  'mamba2-groups': MAMBA2
  | dict(n_groups=2, use_bias=True, tie_word_embeddings=True),
  'lfm2': {k: v for k, v in TINY.items() if k != 'rms_norm_eps'}
  | dict(
    norm_eps=1e-3,
    layer_types=['conv', 'full_attention', 'conv'],
    conv_L_cache=4,
    block_multiple_of=16,
    intermediate_size=100,
  ),
  'lfm2-old': {k: v for k, v in TINY.items() if k != 'rms_norm_eps'}
  | dict(
    full_attn_idxs=[2],
    conv_bias=True,
    block_auto_adjust_ff_dim=False,
    tie_word_embeddings=False,
  ),
  'recurrent_gemma': {
    k: v for k, v in TINY.items() if k != 'max_position_embeddings'
  }
  | dict(attention_window_size=7, num_hidden_layers=4),
  'recurrent_gemma-wide': {
    k: v for k, v in TINY.items() if k != 'max_position_embeddings'
  }
  | dict(
    attention_window_size=64,
    lru_width=48,
    attention_bias=True,
    block_types=['attention', 'recurrent'],
    logits_soft_cap=3.0,
  ),
  'xlstm': dict(
    vocab_size=V,
    hidden_size=128,  # of which their cache rounds parts up to 64
    num_hidden_layers=2,
    num_heads=2,
    gate_soft_cap=5.0,
    norm_eps=1e-3,
    chunk_size=8,
    ffn_round_up_to_multiple_of=16,
    output_logit_soft_cap=3.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
  ),
  'rwkv': RWKV,
  'rwkv-wide': RWKV | dict(intermediate_size=40, tie_word_embeddings=True),
  'jamba': TINY
  | dict(
    num_hidden_layers=5,
    attn_layer_period=3,
    attn_layer_offset=1,
    num_experts=4,
    mamba_dt_rank=3,
    use_mamba_kernels=False,
    pad_token_id=0,
  ),
  'jamba-dense': TINY
  | dict(
    num_hidden_layers=2,
    attn_layer_offset=1,
    attn_layer_period=2,
    num_experts=1,
    mamba_d_state=8,
    mamba_expand=3,
    use_mamba_kernels=False,
    tie_word_embeddings=True,
    pad_token_id=0,
  ),
  'qwen3_next': QWEN3_NEXT,
  'qwen3_next-dense': QWEN3_NEXT
  | dict(
    layer_types=['full_attention', 'linear_attention'],
    num_hidden_layers=2,
    mlp_only_layers=[0],
    linear_num_key_heads=4,
    norm_topk_prob=False,
  ),
  'kimi_linear': {
    k: v for k, v in TINY.items() if k != 'max_position_embeddings'
  }
  | dict(
    num_hidden_layers=4,
    num_key_value_heads=4,
    layer_types=[
      'linear_attention',
      'full_attention',
      'linear_attention',
      'linear_attention',
    ],
    mlp_layer_types=['dense', 'sparse', 'sparse', 'sparse'],
    linear_num_heads=2,
    linear_head_dim=12,
    kv_lora_rank=14,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=10,
    num_experts=8,
    num_experts_per_token=3,
    num_expert_group=4,
    topk_group=2,
    moe_intermediate_size=12,
    num_shared_experts=2,
  ),
  'minimax': TINY
  | dict(
    num_local_experts=6,
    num_experts_per_tok=2,
    head_dim=16,
    block_size=8,
    layer_types=['linear_attention', 'full_attention', 'linear_attention'],
    full_attn_alpha_factor=1.2,
    full_attn_beta_factor=0.8,
    linear_attn_alpha_factor=0.9,
    linear_attn_beta_factor=1.1,
    mlp_alpha_factor=1.3,
    mlp_beta_factor=0.7,
  ),
  'falcon_h1': FALCON_H1,
  'falcon_h1-scaled': FALCON_H1
  | dict(
    mamba_n_groups=2,
    mamba_rms_norm=True,
    mamba_norm_before_gate=False,
    ssm_multipliers=[0.5, 1.5, 0.7, 1.3, 0.9],
    ssm_in_multiplier=1.1,
    ssm_out_multiplier=0.7,
    attention_in_multiplier=0.9,
    attention_out_multiplier=1.3,
    key_multiplier=0.3,
    mlp_multipliers=[0.8, 1.2],
    embedding_multiplier=2.5,
    lm_head_multiplier=0.4,
    tie_word_embeddings=True,
  ),
}
# Theirs let padding reach tokens: by biases, or by the states of recurrences.
LEAKING = (
  'mamba-biases',
  'mamba2-groups',
  'lfm2-old',
  'recurrent_gemma',
  'recurrent_gemma-wide',
  'rwkv',
  'rwkv-wide',
  'xlstm',
)

# Their cache is wrong for several rows, or behind padding (MiniMax).
UNCACHED = ('rwkv', 'rwkv-wide', 'minimax')
