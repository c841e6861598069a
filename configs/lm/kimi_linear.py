"""Kimi-Linear style: three Kimi Delta Attention layers to one of attention.

2510.26692, whose attention layers carry no positions (NoPE): the recurrent
layers tell the order.

  python launch/train.py --config=configs/lm/kimi_linear.py --workdir=runs/kimi_linear

is {size}; give it text of your own with --config.data.path.
On a laptop, in about {minutes} minutes of 2 CPU cores, {result} validation
bits/byte after 300 steps:

  python launch/train.py --config=configs/lm/kimi_linear.py:tiny \
    --workdir=runs/kimi_linear_tiny
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """KDA : attention = 3 : 1."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm',
    d_model=1024,
    num_layers=24,
    num_heads=8,
    pattern=('kda', 'kda', 'kda', 'attention'),
    mixers=dict(attention=dict(position='none')),
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
