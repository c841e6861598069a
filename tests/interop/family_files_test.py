"""Family files hold data: they loop over no blocks and multiply nothing."""

import ast
import pathlib

import pytest

import efficient_attn.interop.families as families
from efficient_attn.interop import FAMILIES
from efficient_attn.models import parameter_count

FOLDER = pathlib.Path(families.__file__).parent
FILES = sorted(FOLDER.glob('*.py'))
FORBIDDEN = {'jax', 'numpy', 'flax', 'torch'}
LOOPS = (ast.For, ast.While, ast.AsyncFor, ast.MatMult, ast.Try, ast.Global)


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_a_family_is_data(file):
  tree = ast.parse(file.read_text())
  for node in ast.walk(tree):
    assert not isinstance(node, LOOPS), f'{file.name}:{node.lineno}'
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names = [getattr(node, 'module', None) or ''] + [
        alias.name for alias in node.names
      ]
      assert not {name.partition('.')[0] for name in names} & FORBIDDEN
  assert len(file.read_text().splitlines()) < 200


def llama(**words):
  return dict(
    model_type='llama', rms_norm_eps=1e-5, vocab_size=128256, rope_theta=5e5
  ) | dict(num_key_value_heads=8, **words)


# Words of published config.json files, and the number of parameters that the
# Hub shows for the safetensors files of each.
PUBLISHED = {
  'meta-llama/Meta-Llama-3-8B': (
    8_030_261_248,
    llama(
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
    ),
  ),
  'meta-llama/Meta-Llama-3-70B': (
    70_553_706_496,
    llama(
      hidden_size=8192,
      intermediate_size=28672,
      num_hidden_layers=80,
      num_attention_heads=64,
    ),
  ),
  'mistralai/Mistral-7B-v0.1': (
    7_241_732_096,
    dict(
      model_type='mistral',
      vocab_size=32000,
      hidden_size=4096,
      intermediate_size=14336,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=8,
      sliding_window=4096,
    ),
  ),
  'Qwen/Qwen2-7B': (
    7_615_616_512,
    dict(
      model_type='qwen2',
      vocab_size=152064,
      hidden_size=3584,
      intermediate_size=18944,
      num_hidden_layers=28,
      num_attention_heads=28,
      num_key_value_heads=4,
      use_sliding_window=False,
      sliding_window=131072,
      max_window_layers=28,
    ),
  ),
  'Qwen/Qwen3-8B': (
    8_190_735_360,
    dict(
      model_type='qwen3',
      vocab_size=151936,
      hidden_size=4096,
      intermediate_size=12288,
      num_hidden_layers=36,
      num_attention_heads=32,
      num_key_value_heads=8,
      head_dim=128,
    ),
  ),
  'HuggingFaceTB/SmolLM3-3B': (
    3_075_098_624,
    dict(
      model_type='smollm3',
      vocab_size=128256,
      hidden_size=2048,
      intermediate_size=11008,
      num_hidden_layers=36,
      num_attention_heads=16,
      num_key_value_heads=4,
    ),
  ),
  'google/gemma-2-9b': (
    9_241_705_984,
    dict(
      model_type='gemma2',
      vocab_size=256000,
      hidden_size=3584,
      intermediate_size=14336,
      num_hidden_layers=42,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=256,
    ),
  ),
  # The Hub counts 27_432_406_640: 416_866_032 more are the vision tower's and
  # 6_194_304 the projector's.
  'google/gemma-3-27b-pt, text': (
    27_432_406_640 - 416_866_032 - 6_194_304,
    dict(
      model_type='gemma3_text',
      vocab_size=262208,
      hidden_size=5376,
      intermediate_size=21504,
      num_hidden_layers=62,
      num_attention_heads=32,
      num_key_value_heads=16,
      head_dim=128,
      query_pre_attn_scalar=168,
      sliding_window=1024,
      rope_scaling=dict(rope_type='linear', factor=8.0),
    ),
  ),
  'allenai/OLMo-2-1124-7B': (
    7_298_617_344,
    dict(
      model_type='olmo2',
      vocab_size=100352,
      hidden_size=4096,
      intermediate_size=11008,
      num_hidden_layers=32,
      num_attention_heads=32,
      num_key_value_heads=32,
    ),
  ),
  'EleutherAI/pythia-6.9b': (
    6_857_302_016,
    dict(
      model_type='gpt_neox',
      vocab_size=50432,
      hidden_size=4096,
      intermediate_size=16384,
      num_hidden_layers=32,
      num_attention_heads=32,
    ),
  ),
  # The file of transformers 5 leaves out lm_head, which is tied.
  'tiiuae/falcon-7b': (
    6_921_720_704,
    dict(
      model_type='falcon',
      vocab_size=65024,
      hidden_size=4544,
      num_hidden_layers=32,
      num_attention_heads=71,
    ),
  ),
  'bigscience/bloom-7b1': (
    7_069_016_064,
    dict(
      model_type='bloom',
      vocab_size=250880,
      hidden_size=4096,
      n_layer=30,
      n_head=32,
    ),
  ),
  'openai-community/gpt2': (
    124_439_808,
    dict(
      model_type='gpt2', vocab_size=50257, n_embd=768, n_layer=12, n_head=12
    ),
  ),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_of_published_models(name):
  count, words = PUBLISHED[name]
  config = FAMILIES[words['model_type']].read(words)
  assert parameter_count(config) == count
