"""Qwen3-Next style: three Gated DeltaNet layers to one of attention.

The attention layers have grouped queries and normalised queries and keys.

  python launch/train.py --config=configs/lm/qwen3_next.py --workdir=runs/qwen3_next

is {size}; give it text of your own with --config.data.path.
On a laptop, in about {minutes} minutes of 2 CPU cores, {result} validation
bits/byte after 300 steps:

  python launch/train.py --config=configs/lm/qwen3_next.py:tiny \
    --workdir=runs/qwen3_next_tiny
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Gated DeltaNet : attention = 3 : 1."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm',
    d_model=1024,
    num_layers=24,
    num_heads=8,
    pattern=('gated_deltanet', 'gated_deltanet', 'gated_deltanet', 'attention'),
    mixers=dict(attention=dict(num_kv_heads=2, qk_norm=True)),
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
