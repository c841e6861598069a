"""Mixers in an image encoder at equal parameters.

  python launch/ablate.py --config=configs/ablations/vit_mixers.py:tiny \\
    --out=runs/vit_mixers

Digits of 8 x 8 pixels in patches of 2 (`tiny`) or of single pixels, 2.2e16
FLOPs of products: 0.6 GPU-hours at 10 TFLOP/s (an estimate from the count).
"""

import ml_collections

from efficient_attn.config import words

ROWS = ('attention', 'linear', 'gla', 'mamba2', 'nystrom', 'fnet')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies."""
  tiny = 'tiny' in words(arg, 'tiny')
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='vit', d_model=128, num_layers=6, num_heads=4, patch_size=1
  )
  config.data = dict(name='digits', augment=True)
  config.optimizer = dict(warmup_steps=100, weight_decay=0.05)
  config.update(steps=3000, batch_size=128)
  if tiny:
    config.model.update(d_model=32, num_layers=2, patch_size=2)
    config.optimizer.warmup_steps = 20
    config.update(steps=300, batch_size=64)
    # With a state of 128 its projections alone are larger than the others.
    config.model.mixers = dict(mamba2=dict(state_dim=16))
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  tiny = 'tiny' in words(arg, 'tiny')
  return dict(
    title='Mixers in an image encoder',
    architectures={name: {'model.pattern': (name,)} for name in ROWS},
    learning_rates=(1e-3, 3e-3, 1e-2) if tiny else (3e-4, 1e-3, 3e-3, 1e-2),
    match='params',
  )
