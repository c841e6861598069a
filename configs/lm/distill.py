"""A language model that learns from a trained one.

  python launch/train.py --config=configs/lm/distill.py:teacher \
      --workdir=runs/teacher
  python launch/train.py --config=configs/lm/distill.py:small \
      --workdir=runs/small --config.teacher.run=runs/teacher
  python launch/train.py --config=configs/lm/distill.py:gla \
      --workdir=runs/gla --config.teacher.run=runs/teacher \
      --config.init_from.run=runs/teacher

`small` has one layer of half the width of the teacher's three. `gla` has three
of gated linear attention in place of softmax attention, and begins with what
both models have in common. Without --config.teacher.run each learns from the
text alone.
"""

import ml_collections

from efficient_attn.config import ConfigError, words

ROTARY = dict(attention=dict(position='rotary'))
MODELS = {
  'teacher': dict(d_model=128, num_layers=3, num_heads=4, mixers=ROTARY),
  'small': dict(d_model=64, num_layers=1, num_heads=2, mixers=ROTARY),
  'gla': dict(
    d_model=128,
    num_layers=3,
    num_heads=4,
    pattern=('gla',),
    mixers=dict(gla=dict(chunk_size=32)),
  ),
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """One of MODELS (small)."""
  names = words(arg, *MODELS) or {'small'}
  if len(names) > 1:
    raise ConfigError(f'--config=...:{arg}: name one model, not {len(names)}')
  (name,) = names
  config = ml_collections.ConfigDict()
  config.steps = 1000 if name == 'teacher' else 400
  config.batch_size = 8
  config.checkpoint_every = 200
  config.model = dict(name='lm', **MODELS[name])
  config.data = dict(name='text', seq_len=256)
  config.optimizer = dict(learning_rate=4e-3, warmup_steps=40)
  if name != 'teacher':
    config.teacher = dict(weight=0.9, temperature=2.0)
  if name == 'gla':
    others = ('*.mixer.*',)
    config.init_from = dict(new=others, unused=others, resized=others)
  return config
