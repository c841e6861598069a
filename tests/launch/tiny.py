"""A model small enough to start many times."""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  del arg
  config = ml_collections.ConfigDict()
  config.steps = 80
  config.batch_size = 8
  config.log_every = 1
  config.eval_batches = 2
  config.checkpoint_every = 4
  config.model = dict(
    d_model=16,
    num_layers=2,
    num_heads=4,
    pattern=('gla', 'attention'),
    mixers=dict(gla=dict(chunk_size=8)),
  )
  config.data = dict(seq_len=32)
  config.optimizer = dict(learning_rate=0.01)
  return config
