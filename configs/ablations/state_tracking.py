"""State tracking: does a mixer keep the product of a group's elements?

  python launch/ablate.py --config=configs/ablations/state_tracking.py:tiny \\
    --out=runs/state_tracking

Accuracy counts behind the training length only. A delta rule whose transition
has eigenvalues in [0, 1] cannot keep a parity (2411.12537); one in [-1, 1] can,
and two reflections a token keep a permutation of three (2502.10297). The full
study has 3.8e15 FLOPs of products, minutes of a GPU (an estimate from the
count).
"""

import ml_collections

from efficient_attn.config import words

TASKS = {
  # Group, training length, vocabulary.
  'parity': ('parity', 16, 2),
  'modulo 3': ('Z_3', 8, 3),
  'S_3': ('S_3', 8, 6),
  'S_5': ('S_5', 8, 120),
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies."""
  tiny = 'tiny' in words(arg, 'tiny')
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=128, num_layers=1, num_heads=8, ffn='mlp'
  )
  config.data = dict(name='state_tracking', valid_examples=512)
  config.optimizer = dict(
    warmup_steps=100, weight_decay=0.0, options=dict(b2=0.99)
  )
  config.update(steps=5000, batch_size=256)
  if tiny:
    config.model.update(d_model=64, ffn_dim=32)
    config.optimizer.warmup_steps = 20
    config.update(steps=500, batch_size=32)
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  tiny = 'tiny' in words(arg, 'tiny')

  def task(group, length, vocabulary):
    return {
      'data.options': dict(group=group, seq_len=length),
      'data.valid_options': dict(seq_len=3 * length, valid_after=length),
      'model.vocab_size': vocabulary,
    }

  def mixer(name, **options):
    options = dict(conv_width=0, **options)
    return {'model.pattern': (name,), f'model.mixers.{name}': options}

  both = {'negative': True, 'positive': False}
  architectures = {
    f'{name} {sign}': mixer(name, negative_eigenvalues=value)
    for name in ('deltanet', 'deltaproduct')
    for sign, value in both.items()
  }
  names = ('parity', 'S_3') if tiny else TASKS
  return dict(
    title='State tracking',
    tasks={name: task(*TASKS[name]) for name in names},
    architectures=architectures,
    learning_rates=(2.5e-3, 5e-3, 1e-2, 2e-2)
    if tiny
    else (1e-3, 3e-3, 1e-2, 3e-2),
    weight_decays=(0.0,),
  )
