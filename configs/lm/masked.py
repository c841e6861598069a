"""BERT's masked language model on Python source (1810.04805).

  python launch/train.py --config=configs/lm/masked.py --workdir=runs/masked
  python launch/train.py --config=configs/lm/masked.py --workdir=runs/gla \\
    --config.model.pattern=gla

On 2 CPU cores, 1000 steps take 210 s of CPU time and end at 1.39 nats a masked
byte, of which 62.4 % are right.
"""

import ml_collections

from efficient_attn.config import words


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """Three bidirectional layers over bytes."""
  words(arg)  # it has none
  config = ml_collections.ConfigDict()
  config.steps = 1000
  config.batch_size = 8
  config.checkpoint_every = 250
  config.model = dict(
    name='encoder',
    d_model=96,
    num_layers=3,
    num_heads=4,
    pattern=('attention',),
    vocab_size=257,  # bytes and the mask
  )
  config.data = dict(name='text', seq_len=256, corruption='mask')
  config.optimizer = dict(learning_rate=6e-3, warmup_steps=50)
  return config
