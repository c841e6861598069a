"""Associative recall: which mixers find the value of a key again?

  python launch/ablate.py --config=configs/ablations/mqar.py:tiny \\
    --out=runs/mqar

`tiny` asks for 8 pairs in 64 tokens of a vocabulary of 64: attention and the
delta rule solve it, linear attention without a gate does not.
"""

import ml_collections


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=64, num_layers=2, num_heads=2, vocab_size=64, ffn='none'
  )
  config.data = dict(
    name='mqar',
    options=dict(vocab_size=64, segments=((64, 8, 1),)),
    valid_examples=512,
  )
  config.optimizer = dict(warmup_steps=50, weight_decay=0.1)
  config.update(steps=600, batch_size=64)
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  return dict(
    title='Multi-query associative recall',
    architectures={
      name: {'model.pattern': (name,)}
      for name in ('attention', 'deltanet', 'gla', 'linear_attention')
    },
    learning_rates=(1e-3, 3e-3, 1e-2),
    weight_decays=(0.1,),
    seeds=(0, 1, 2),
  )
