"""What cannot run is one line before any device starts."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import config_files
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixers import MIXERS, mixer_options
from efficient_attn.train.check import check, report

LM = dict(
  steps=20,
  model=dict(name='lm', d_model=16, num_layers=1, num_heads=4),
  data=dict(seq_len=32),
)
TASK = dict(
  steps=20,
  model=dict(name='lm', d_model=16, num_layers=1, num_heads=4, vocab_size=32),
  data=dict(name='palindrome'),
)
VIT = dict(
  steps=20,
  model=dict(name='vit', d_model=16, num_layers=1, num_heads=4),
  data=dict(name='digits'),
)
PIXELS = dict(
  steps=20,
  model=dict(
    name='classifier', d_model=16, num_layers=1, num_heads=4, num_classes=10
  ),
  data=dict(name='pixels'),
)
SPANS = LM | dict(
  model=LM['model'] | dict(name='encoder_decoder', vocab_size=300),
  data=LM['data'] | dict(corruption='spans'),
)


def checked(values, **changes):
  return check(configs.resolve(configs.override(values, changes)))


@pytest.mark.parametrize(
  'values, changes, message',
  [
    (LM, {'model.ffn': 'gul'}, "model.ffn='gul' is unknown"),
    (LM, {'model.norm': 'rms'}, "did you mean 'rmsnorm'"),
    (LM, {'model.activation': 'swish'}, "model.activation='swish'"),
    (LM, {'model.remat': 'dot'}, "did you mean 'dots'"),
    (LM, {'model.pattern': 'gla,attentoin'}, "did you mean 'attention'"),
    (LM, {'optimizer.name': 'adamv'}, "did you mean 'adamw'"),
    (LM, {'optimizer.schedule': 'cosin'}, "did you mean 'cosine'"),
    (LM, {'data.name': 'txet'}, "did you mean 'text'"),
    (LM, {'mesh': 'tenser=2'}, "did you mean 'tensor'"),
    (LM, {'mesh': 'tensor=x'}, 'tensor needs a size'),
    (LM, {'profile_steps': '5'}, "must be 'first:last'"),
    (LM, {'profile_steps': '21:25'}, 'the run has the steps 1 to 20'),
    (LM, {'optimizer.warmup_steps': 20}, 'warmup_steps=2$'),
    # Options, also of mixers that the pattern does not have.
    (LM, {'model.mixers.gla.conv_widht': 4}, "did you mean 'conv_width'"),
    (LM, {'model.mixers.gal.conv_width': 4}, "model.mixers='gal' is unknown"),
    (LM, {'model.mixers.attention.qk_norm': 'no'}, 'attention.qk_norm'),
    (LM, {'model.mixers.window.window': 'abc'}, 'must be of type int'),
    (LM, {'model.mixers.window.window': 1.5}, 'must be of type int'),
    (LM, {'model.mixers.window:far.window': 0}, r'window:far\.window=0'),
    (LM, {'model.mixers.gla.chunk_size': 48}, 'chunk_size=48 must be a power'),
    (LM, {'model.mixers.attention.implementation': 'x'}, 'does not exist'),
    (LM, {'model.mixers.attention.head_dim': 3}, 'rotates 3 channels'),
    (LM, {'model.mixers.attention.num_kv_heads': 3}, 'does not divide'),
    (LM, {'optimizer.options.b3': 0.9}, 'is not an option of adamw'),
    (LM, {'optimizer.options.b1': 1.5}, r'options\.b1=1\.5 must be in'),
    (LM, {'optimizer.options.nesterov': 'no'}, 'must be of type bool'),
    (LM, {'optimizer.options.mu_dtype': 'bf16'}, "did you mean 'bfloat16'"),
    (TASK, {'data.options.seq_len': 'abc'}, 'must be of type int'),
    (TASK, {'data.valid_options.seqlen': 3}, "did you mean 'seq_len'"),
    # Keys that the dataset does not read.
    (VIT, {'data.path': 'x.txt'}, "data.path='x.txt' is not a key of"),
    (VIT, {'data.tokenizer': 'x.json'}, 'is not a key of'),
    (VIT, {'data.packing': 'segments'}, 'is not a key of'),
    (TASK, {'data.seq_len': 64}, 'is not a key of'),
    (LM, {'data.options.seq_len': 64}, 'is not a key of'),
    # Models that do not fit their data.
    (LM, {'data': {'name': 'digits'}}, "use model.name='vit'"),
    (VIT, {'data': {'name': 'text'}}, "does not read data.name='text'"),
    (LM, {'model.name': 'auto_encoder'}, "does not read data.name='text'"),
    (LM, {'model.vocab_size': 100}, 'below the 256 tokens'),
    (VIT, {'model.num_classes': 9}, 'below the 10 classes'),
    (VIT, {'model.channels': 3}, 'are 8 x 8 x 1'),
    (VIT, {'model.image_size': 16}, 'are 8 x 8 x 1'),
    (LM, {'model.position': 'learned', 'model.max_len': 31}, 'the 32 tokens'),
    (PIXELS, {'model.num_classes': 9}, 'below the 10 classes'),
    (PIXELS, {'model.position': 'learned', 'model.max_len': 63}, 'the 64 tok'),
    (SPANS, {'model.position': 'learned', 'model.max_len': 31}, 'the 32 tok'),
    (SPANS, {'model.vocab_size': 257}, "and data.corruption='spans'"),
    (SPANS, {'model.encoder_pattern': 'fox'}, 'encoder reads both ways'),
    (LM, {'model.pattern': 'fnet'}, 'mixer of encoders'),
    (VIT, {'model.pattern': 'fox'}, 'causal only'),
    (
      LM,
      {'model.pattern': 'sinkhorn', 'model.mixers.sinkhorn.max_blocks': 1}
      | {'data.seq_len': 128},
      r'model\.mixers\.sinkhorn: .* max_blocks=1',
    ),
    (
      LM,
      {'data.packing': 'segments', 'model.pattern': 'sinkhorn'},
      'cannot keep packed sequences apart',
    ),
    (LM, {'data.seq_len': 10**9, 'batch_size': 100}, 'this machine has'),
  ],
  ids=lambda x: str(x)[:40] if isinstance(x, dict) and len(x) < 3 else '',
)
def test_mistakes_are_one_line(values, changes, message):
  with pytest.raises(ConfigError, match=message) as error:
    checked(values, **changes)
  assert '\n' not in str(error.value)


def test_options_are_read_by_their_annotations():
  config = checked(
    LM,
    **{
      'model.mixers.attention.qk_norm': 'false',
      'model.mixers.window.window': '7',
      'optimizer.options.nesterov': 'false',
      'optimizer.options.b2': '0.95',
    },
  ).config
  assert config.model.mixers['attention']['qk_norm'] is False
  assert config.model.mixers['window']['window'] == 7
  assert config.optimizer.options['nesterov'] is False
  assert config.optimizer.options['b2'] == 0.95


@pytest.mark.parametrize('values', [LM, TASK, VIT])
def test_the_checked_config_holds_every_option(values, tmp_path):
  config = checked(values).config
  assert set(config.model.mixers['attention']) == set(
    mixer_options('attention')
  )
  assert config.optimizer.options['b2'] == 0.999
  if values is TASK:
    assert config.data.options == {'vocab_size': 17, 'seq_len': 64}
  config_files.save(config, tmp_path / 'config.json')
  saved = configs.resolve(config_files.load(str(tmp_path / 'config.json')))
  assert check(saved).config == config


@pytest.mark.parametrize('name', MIXERS)
def test_every_option_of_a_mixer_has_a_type_and_a_default_that_fits(name):
  from efficient_attn.layers.mixers import read_options

  options = mixer_options(name)
  defaults = {k: p.default for k, p in options.items()}
  assert read_options(name, defaults) == defaults
  for option in options:
    with pytest.raises(ConfigError, match=f'model.mixers.{name}.{option}'):
      read_options(name, {option: object()})


def test_no_device_starts():
  code = (
    'from jax._src import xla_bridge\n'
    'from efficient_attn import config as configs\n'
    'from efficient_attn.train.check import check, report\n'
    f'print(len(report(check(configs.resolve({LM})))))\n'
    'assert not xla_bridge.backends_are_initialized()\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=200)


def test_report_adds_up():
  run = checked(LM)
  text = report(run)
  count = sum(
    np.prod(x.shape)
    for x in jax.tree.leaves(run.architecture.abstract_params())
  )
  assert f'{count:,}' in text and 'a step: 256 tokens' in text
  assert f'parameters: {4 * count / 2**20:,.1f} MiB' in text
  assert f'optimizer: {8 * count / 2**20:,.1f} MiB' in text
