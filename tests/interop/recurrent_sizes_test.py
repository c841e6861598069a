"""Published recurrent and hybrid models have as many parameters as we count.

Words of their config.json files, and the numbers that the Hub shows.
"""

import pytest

from efficient_attn.interop import FAMILIES
from efficient_attn.models import parameter_count

PUBLISHED = {
  'state-spaces/mamba-130m-hf': (
    129_135_360,
    dict(
      model_type='mamba',
      vocab_size=50280,
      hidden_size=768,
      num_hidden_layers=24,
    ),
  ),
  'state-spaces/mamba2-2.7b': (
    2_702_599_680,
    dict(
      model_type='mamba2',
      vocab_size=50288,
      hidden_size=2560,
      num_hidden_layers=64,
      num_heads=80,
      n_groups=1,
      tie_word_embeddings=True,
    ),
  ),
  'tiiuae/falcon-mamba-7b': (
    7_272_665_088,
    dict(
      model_type='falcon_mamba',
      vocab_size=65024,
      hidden_size=4096,
      num_hidden_layers=64,
      tie_word_embeddings=False,
    ),
  ),
  'google/recurrentgemma-2b': (
    2_682_862_080,
    dict(
      model_type='recurrent_gemma',
      vocab_size=256000,
      hidden_size=2560,
      intermediate_size=15360,
      num_hidden_layers=26,
      num_attention_heads=10,
      num_key_value_heads=1,
    ),
  ),
  'LiquidAI/LFM2-1.2B': (
    1_170_340_608,
    dict(
      model_type='lfm2',
      vocab_size=65536,
      hidden_size=2048,
      block_ff_dim=12288,
      num_hidden_layers=16,
      num_attention_heads=32,
      num_key_value_heads=8,
      full_attn_idxs=[2, 5, 8, 10, 12, 14],
    ),
  ),
  'NX-AI/xLSTM-7b': (
    6_865_424_896,
    dict(
      model_type='xlstm',
      vocab_size=50304,
      hidden_size=4096,
      num_hidden_layers=32,
      num_heads=8,
    ),
  ),
  'RWKV/rwkv-4-169m-pile': (
    169_342_464,
    dict(
      model_type='rwkv',
      vocab_size=50277,
      hidden_size=768,
      num_hidden_layers=12,
    ),
  ),
  'ai21labs/Jamba-v0.1': (
    51_570_323_328,
    dict(
      model_type='jamba',
      vocab_size=65536,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
    ),
  ),
  # Without the layer that predicts one more token, `mtp.*`.
  'Qwen/Qwen3-Next-80B-A3B-Instruct': (
    79_674_391_296,
    dict(
      model_type='qwen3_next',
      vocab_size=151936,
      hidden_size=2048,
      intermediate_size=5120,
      num_hidden_layers=48,
      num_attention_heads=16,
      num_key_value_heads=2,
      rope_theta=1e7,
    ),
  ),
  'moonshotai/Kimi-Linear-48B-A3B-Base': (
    49_122_681_728,
    dict(
      model_type='kimi_linear',
      vocab_size=163840,
      hidden_size=2304,
      intermediate_size=9216,
      num_hidden_layers=27,
      num_attention_heads=32,
      num_key_value_heads=32,
      linear_attn_config=dict(
        full_attn_layers=[4, 8, 12, 16, 20, 24, 27],
        num_heads=32,
        head_dim=128,
        short_conv_kernel_size=4,
      ),
      num_experts=256,
      num_experts_per_token=8,
      moe_intermediate_size=1024,
      num_shared_experts=1,
      first_k_dense_replace=1,
    ),
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_of_published_models(name):
  count, words = PUBLISHED[name]
  config = FAMILIES[words['model_type']].read(words)
  assert parameter_count(config) == count
