"""Words of files that older versions of transformers wrote."""

import jax
import numpy as np
import pytest

pytest.importorskip('torch')
pytest.importorskip('transformers')

from safetensors.numpy import load_file, save_file

from efficient_attn import interop
from efficient_attn.interop.family import differences
from tests.interop import published
from tests.interop.published import FALCON, GEMMA, GPT2, NEOX, TINY


def old(words, *names, **others):
  """Returns words without the names of today."""
  words = {k: v for k, v in words.items() if k not in names}
  return words | dict(torch_dtype='float32', **others)


LINEAR = dict(type='linear', factor=4.0)
YARN = dict(type='yarn', factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
  rope_type='llama3',
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
LONG = dict(
  rope_type='longrope',
  short_factor=[1.0] * 4,
  long_factor=[2.0] * 4,
  original_max_position_embeddings=16,
)
OLD = {
  'llama': old(TINY, 'num_key_value_heads', rope_theta=5e5),
  'llama-linear': old(TINY, rope_theta=1e3, rope_scaling=LINEAR),
  'llama-3': old(TINY, rope_theta=1e3, rope_scaling=LLAMA3),
  'llama-long': old(TINY, rope_theta=1e3, rope_scaling=LONG),
  'llama-dynamic': old(TINY, rope_scaling=dict(type='dynamic', factor=2.0)),
  'llama-none': old(TINY, rope_scaling=None, head_dim=None),
  'mistral': old(TINY, rope_theta=1e3),
  'qwen2': old(TINY, rope_theta=1e3, sliding_window=7, max_window_layers=1),
  'qwen2-window': old(
    TINY, use_sliding_window=True, sliding_window=7, max_window_layers=1
  ),
  'qwen3': old(TINY, rope_theta=1e3, rope_scaling=YARN),
  'smollm3': old(TINY, rope_theta=1e3, no_rope_layers=None),
  'gemma2': old(GEMMA, rope_theta=1e3),
  'gemma3_text': old(
    GEMMA,
    num_hidden_layers=5,
    sliding_window_pattern=2,
    rope_theta=1e5,
    rope_local_base_freq=1e3,
    rope_scaling=dict(rope_type='linear', factor=8.0),
  ),
  'gemma3_text-short': GEMMA,
  'olmo2': old(TINY, rope_theta=1e3),
  'olmo3': old(TINY, rope_theta=1e3, rope_scaling=YARN),
  'gpt_neox': old(NEOX, rotary_pct=0.5, rotary_emb_base=1000),
  'gpt_neox-short': NEOX,
  'gpt2': old(GPT2, n_ctx=64),
  'falcon': old(FALCON, rope_theta=1e3),
  'bloom': old(published.BLOOM, seq_length=64, offset_alibi=100),
  'diffllama': old(TINY, rope_theta=1e3),
}


@pytest.mark.parametrize('name', OLD)
def test_old_words_mean_what_transformers_reads(name):
  model_type = name.partition('-')[0]
  family = interop.FAMILIES[model_type]
  config = published.make_config(model_type, OLD[name])
  today = config.to_dict()
  for word in ('n_ctx', 'seq_length', 'offset_alibi', 'torch_dtype'):
    today.pop(word, None)
  assert not differences(family.read(OLD[name]), family.read(today))


@pytest.mark.parametrize(
  'case,renamed',
  [
    ('gpt_neox', {'embed_out.weight': 'lm_head.weight'}),
    ('gpt2', {'transformer.': ''}),
    ('bloom', {'transformer.': ''}),
  ],
)
def test_names_that_tensors_had_before(case, renamed, tmp_path):
  published.make(case).save_pretrained(tmp_path)
  file = tmp_path / 'model.safetensors'
  tensors = load_file(file)
  wanted = interop.load(tmp_path)[1]
  for now, before in renamed.items():
    assert any(now in name for name in tensors)
    tensors = {k.replace(now, before): v for k, v in tensors.items()}
  tensors = {k: np.array(v) for k, v in tensors.items()}
  save_file(tensors, file)
  found = interop.load(tmp_path)[1]
  for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)
