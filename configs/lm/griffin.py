"""Griffin: two RG-LRU layers to one of local attention (2402.19427).

The attention has one key-value head (MQA) and a window of 1024 tokens; the
feed-forward layers are GeGLU.

  python launch/train.py --config=configs/lm/griffin.py --workdir=runs/griffin

is {size}; give it text of your own with --config.data.path.
On a laptop, in about {minutes} minutes of 2 CPU cores, {result} validation
bits/byte after 300 steps:

  python launch/train.py --config=configs/lm/griffin.py:tiny \
    --workdir=runs/griffin_tiny
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """RG-LRU : window = 2 : 1."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm',
    d_model=1024,
    num_layers=24,
    num_heads=8,
    pattern=('rg_lru', 'rg_lru', 'window'),
    mixers=dict(window=dict(window=1024, num_kv_heads=1)),
    activation='gelu',
  )
  config.data = dict(name='text', seq_len=2048)
  config.optimizer = dict(learning_rate=3e-4, warmup_steps=1000)
  config.batch_size = 128
  config.steps = 20_000
  if arg == 'tiny':
    config.model.update(d_model=96, num_layers=3, num_heads=4)
    config.data.seq_len = 256
    config.optimizer.update(learning_rate=6e-3, warmup_steps=30)
    config.update(steps=300, batch_size=8)
  elif arg:
    raise ValueError(f'unknown argument {arg!r}: use :tiny or none')
  return config
