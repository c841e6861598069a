"""Recall against memory: accuracy over the bytes of the decode state.

  python launch/ablate.py --config=configs/ablations/state_size.py:tiny \\
    --out=runs/state_size

The frontier of Based (2402.18668): a mixer with a larger state recalls more,
and at equal size some recall more than others. The full study has 5.5e17 FLOPs
of products: 15 GPU-hours at 10 TFLOP/s (an estimate from the count).
"""

import ml_collections

from efficient_attn.config import words

ROWS = ('deltanet', 'gla', 'linear')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies."""
  tiny = 'tiny' in words(arg, 'tiny')
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=64, num_layers=2, num_heads=2, vocab_size=8192
  )
  config.model.ffn = 'none'
  config.data = dict(
    name='mqar', options=dict(vocab_size=8192, segments=((256, 64, 1),))
  )
  # Without end they would take longer to draw than to learn.
  config.data.train_examples = 0 if tiny else 100_000
  config.optimizer = dict(warmup_steps=500)
  config.update(steps=20_000, batch_size=256)
  if tiny:
    config.model.vocab_size = 256
    config.data.options.update(vocab_size=256, segments=((64, 8, 1),))
    config.data.valid_examples = 512
    config.optimizer.warmup_steps = 50
    config.update(steps=500, batch_size=32)
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  tiny = 'tiny' in words(arg, 'tiny')
  rows = ('deltanet', 'linear') if tiny else ROWS
  widths = (16, 32, 64) if tiny else (32, 64, 128, 256)
  windows = (8, 32) if tiny else (8, 32, 128, 256)

  def options(name, width):
    return {'model.pattern': ('base_conv', name), 'model.d_model': width}

  return dict(
    title='Recall against memory',
    architectures={
      f'{name} {width}': options(name, width)
      for name in rows
      for width in widths
    }
    | {
      f'window {window}': {
        'model.pattern': ('base_conv', 'window'),
        'model.mixers.window': dict(window=window),
      }
      for window in windows
    }
    | {'attention': {'model.pattern': ('base_conv', 'attention')}},
    learning_rates=(3e-3, 1e-2, 3e-2) if tiny else (1e-3, 3e-3, 1e-2, 3e-2),
  )
