"""Associative recall: which mixers find the value of a key again?

  python launch/ablate.py --config=configs/ablations/mqar.py:tiny \\
    --out=runs/mqar

`tiny` asks for 8 pairs in 64 tokens of a vocabulary of 256. `zoology` (the
default) is figure 2 of Zoology (2312.04927) in the settings of its code. `cell`
is one cell of it, in 4 of its 64 epochs with one of its four learning rates:
39 minutes on a busy CPU core (measured), where 64 epochs would take 10 hours.
The whole figure has 1.3e18 FLOPs of products: 35 GPU-hours at 10 TFLOP/s (an
estimate from the count).

Differences from that code: dropout is that of embeddings and residual branches
here, of embeddings and attention weights there; initial values are this
framework's; a run does not stop early (there at an accuracy of 0.99).
"""

import ml_collections

from efficient_attn.config import choose

NAMED = 'the argument after the colon of --config'
EXAMPLES = 100_000
# Length, pairs -> batch size. Four learning rates from 1e-4 to 1e-2.
ZOOLOGY = {(64, 4): 512, (128, 8): 512, (256, 16): 256, (512, 64): 128}
RATES = (1e-4, 10 ** (-10 / 3), 10 ** (-8 / 3), 1e-2)
WIDTHS = (64, 128, 256, 512)
# Read off the figure, within 0.02. Attention solves every cell.
RWKV4 = {('64/4', 64): 0.76, ('256/16', 512): 0.80, ('512/64', 512): 0.37}
# What a mixer of `zoology` has beside its width.
ROWS = {
  'attention': {
    'model.position': 'learned',
    'model.max_len': 512,
    'model.num_heads': 1,
  },
  'rwkv4': {},
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies: tiny, cell or zoology."""
  choose(NAMED, arg, dict.fromkeys(('', 'tiny', 'cell', 'zoology')))
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=128, num_layers=2, num_heads=2, vocab_size=8192
  )
  config.model.ffn = 'none'
  config.data = dict(name='mqar', options=dict(vocab_size=8192))
  config.optimizer = dict(weight_decay=0.1)
  if arg == 'tiny':
    config.model.update(d_model=64, vocab_size=256)
    config.data.options.update(vocab_size=256, segments=((64, 8, 1),))
    config.data.valid_examples = 512
    config.optimizer.warmup_steps = 50
    config.update(steps=500, batch_size=32)
    return config
  config.model.update(norm='layernorm', dropout=0.1)
  config.optimizer.clip_norm = 0.0
  attention = dict(position='none', qkv_bias=True, out_bias=True)
  config.model.mixers = dict(attention=attention)
  config.data.update(train_examples=EXAMPLES, valid_examples=3000)
  epochs = 4 if arg == 'cell' else 64
  config.update(steps=epochs * EXAMPLES // 512, batch_size=512)
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  study = dict(title='Multi-query associative recall')
  if arg == 'tiny':
    return study | dict(
      learning_rates=(3e-3, 1e-2, 3e-2),
      architectures={
        name: {'model.pattern': ('base_conv', name)}
        for name in ('attention', 'deltanet', 'mamba', 'gla', 'linear')
      },
    )
  study |= dict(seeds=(0,), source='figure 2 of 2312.04927')
  if arg == 'cell':
    return study | dict(
      title='One cell of figure 2 of Zoology, in 4 of 64 epochs',
      source='figure 2 of 2312.04927: the best of four learning rates, each in '
      'up to 64 epochs; here one, in 4',
      learning_rates=RATES[-1:],
      tasks={'64/4': {'data.options.segments': ((64, 4, 1),)}},
      architectures={'attention 64': _row('attention', 64)},
      published={'64/4': {'attention 64': 1.0}},
    )
  tasks = {f'{length}/{pairs}': (length, pairs) for length, pairs in ZOOLOGY}
  return study | dict(
    band=0.03,
    learning_rates=RATES,
    tasks={
      task: {
        'data.options.segments': ((*segment, 1),),
        'batch_size': ZOOLOGY[segment],
        'steps': 64 * EXAMPLES // ZOOLOGY[segment],
      }
      for task, segment in tasks.items()
    },
    architectures={
      f'{name} {width}': _row(name, width) for name in ROWS for width in WIDTHS
    },
    published={
      task: {f'attention {width}': 1.0 for width in WIDTHS}
      | {f'rwkv4 {w}': v for (name, w), v in RWKV4.items() if name == task}
      for task in tasks
    },
  )


def _row(name, width):
  return {'model.pattern': (name,), 'model.d_model': width} | ROWS[name]
