"""Published models of experts, built without values: all their parameters.

The words are those of their config.json that decide on shapes.
"""

import pytest

from efficient_attn import interop, models

MIXTRAL_8X7B = dict(
  vocab_size=32_000,
  hidden_size=4096,
  intermediate_size=14_336,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=8,
  num_local_experts=8,
  num_experts_per_tok=2,
)
QWEN3_30B = dict(
  vocab_size=151_936,
  hidden_size=2048,
  intermediate_size=6144,
  moe_intermediate_size=768,
  num_hidden_layers=48,
  num_attention_heads=32,
  num_key_value_heads=4,
  head_dim=128,
  num_experts=128,
  num_experts_per_tok=8,
)
GPT_OSS_120B = dict(
  vocab_size=201_088,
  hidden_size=2880,
  intermediate_size=2880,
  num_hidden_layers=36,
  num_attention_heads=64,
  num_key_value_heads=8,
  head_dim=64,
  num_local_experts=128,
  num_experts_per_tok=4,
)
# Without the layer that predicts one more token.
DEEPSEEK_V3 = dict(
  vocab_size=129_280,
  hidden_size=7168,
  intermediate_size=18_432,
  moe_intermediate_size=2048,
  num_hidden_layers=61,
  num_attention_heads=128,
  num_key_value_heads=128,
  q_lora_rank=1536,
  kv_lora_rank=512,
  qk_nope_head_dim=128,
  qk_rope_head_dim=64,
  v_head_dim=128,
  n_routed_experts=256,
  n_shared_experts=1,
  n_group=8,
  topk_group=4,
  num_experts_per_tok=8,
  first_k_dense_replace=3,
)


@pytest.mark.parametrize(
  'family,words,count',
  [
    ('mixtral', MIXTRAL_8X7B, 46_702_792_704),
    ('qwen3_moe', QWEN3_30B, 30_532_122_624),
    ('gpt_oss', GPT_OSS_120B, 116_829_156_672),
    ('deepseek_v3', DEEPSEEK_V3, 671_026_419_200),
  ],
)
def test_parameters(family, words, count):
  config = interop.FAMILIES[family].read(words | {'model_type': family})
  assert models.parameter_count(config) == count
