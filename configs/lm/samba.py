"""Samba: Mamba and sliding-window attention take turns (2406.07522).

Mamba remembers, a window of 2048 tokens recalls; no layer grows with the
length.

  python launch/train.py --config=configs/lm/samba.py --workdir=runs/samba

is {size}; give it text of your own with --config.data.path.
On a laptop, in about {minutes} minutes of 2 CPU cores, {result} validation
bits/byte after 300 steps:

  python launch/train.py --config=configs/lm/samba.py:tiny \
    --workdir=runs/samba_tiny
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Mamba : window = 1 : 1."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm',
    d_model=1024,
    num_layers=24,
    num_heads=8,
    pattern=('mamba', 'window'),
    mixers=dict(window=dict(window=2048)),
  )
  config.data = dict(name='text', seq_len=2048)
  config.optimizer = dict(learning_rate=3e-4, warmup_steps=1000)
  config.batch_size = 128
  config.steps = 20_000
  if arg == 'tiny':
    config.model.update(d_model=96, num_layers=4, num_heads=4)
    config.data.seq_len = 256
    config.optimizer.update(learning_rate=6e-3, warmup_steps=30)
    config.update(steps=300, batch_size=8)
  elif arg:
    raise ValueError(f'unknown argument {arg!r}: use :tiny or none')
  return config
