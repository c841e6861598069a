"""Language modelling by attention, recurrences and 3:1 hybrids, at equal size.

python launch/ablate.py --config=configs/ablations/lm_quality.py:tiny \\
    --out=runs/lm_quality

At equal parameters; with `:tiny,state` or `:state` at equal bytes of the decode
state. Attention has one kv head there, without which the others would have
several times its parameters. A full study has 8e20 FLOPs of products: 1100
GPU-hours at 200 TFLOP/s (an estimate from the count).
"""

import ml_collections

from efficient_attn.config import words


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies: bytes of the standard library by default."""
  config = ml_collections.ConfigDict()
  config.model = dict(name='lm', d_model=1024, num_layers=24, num_heads=8)
  config.data = dict(name='text', seq_len=2048)
  config.optimizer = dict(warmup_steps=1000, weight_decay=0.1)
  config.update(steps=20_000, batch_size=128, eval_batches=200)
  found = words(arg, 'tiny', 'state')
  tiny, state = 'tiny' in found, 'state' in found
  if tiny:
    config.model.update(d_model=64, num_layers=4, num_heads=4)
    config.data.seq_len = 128
    config.optimizer.warmup_steps = 20
    config.update(steps=200, batch_size=8, eval_batches=20)
  if state:
    config.model.mixers = dict(attention=dict(num_kv_heads=1))
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  found = words(arg, 'tiny', 'state')
  tiny, state = 'tiny' in found, 'state' in found
  patterns = {
    'attention': ('attention',),
    'gated_deltanet': ('gated_deltanet',),
    'kda': ('kda',),
    'linear': ('linear',),
    '3 gated_deltanet : 1 attention': ('gated_deltanet',) * 3 + ('attention',),
    '3 kda : 1 attention': ('kda',) * 3 + ('attention',),
  }
  if tiny:
    del patterns['kda'], patterns['3 kda : 1 attention']
  equal = 'decode state' if state else 'parameters'
  return dict(
    title=f'Language modelling at equal {equal}',
    architectures={
      name: {'model.pattern': pattern} for name, pattern in patterns.items()
    },
    learning_rates=(3e-3, 6e-3, 1.2e-2)
    if tiny
    else (3e-4, 6e-4, 1.2e-3, 2.4e-3),
    metric='bits_per_byte',
    match='state' if state else 'params',
  )
