"""Associative recall: which mixers find the value of a key again?

  python launch/ablate.py --config=configs/ablations/mqar.py:tiny \\
    --out=runs/mqar

`tiny` asks for 8 pairs in 64 tokens of a vocabulary of 256. `zoology` is figure
2 of Zoology (2312.04927), `based` that of Based (2402.18668) in the settings of
their code: both want an accelerator.
"""

import ml_collections

from efficient_attn.config import choose

NAMED = 'the argument after the colon of --config'
ZOOLOGY = ((64, 4), (128, 8), (256, 16), (512, 64))
BASED = (
  (64, 4, 100),
  (128, 8, 20),
  (256, 16, 20),
  (256, 32, 20),
  (256, 64, 20),
)
BASED_TESTS = (
  (64, 4),
  (64, 8),
  (64, 16),
  (128, 32),
  (256, 64),
  (512, 128),
  (1024, 256),
)


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies: tiny, zoology (the default) or based."""
  choose(NAMED, arg, dict.fromkeys(('', 'tiny', 'zoology', 'based')))
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
  elif arg == 'based':
    config.data.options.segments = BASED
    config.data.update(train_examples=180_000)
    config.update(steps=32 * 180_000 // 256, batch_size=256)
  else:
    config.data.update(train_examples=100_000, valid_examples=3000)
    config.model.mixers = dict(attention=dict(position='none'))
    config.model.update(position='learned', max_len=512)
    config.update(steps=64 * 100_000 // 512, batch_size=512)
  return config


def sweep(arg: str = '') -> dict:
  """What is compared."""
  study = dict(title='Multi-query associative recall')
  if arg == 'tiny':
    return study | dict(
      learning_rates=(3e-3, 1e-2),
      architectures={
        name: {'model.pattern': ('base_conv', name)}
        for name in ('attention', 'deltanet', 'mamba', 'gla', 'linear')
      },
    )
  if arg == 'based':
    # Accuracy over all tests, at d_model 64, 128 and 256.
    return study | dict(
      learning_rates=(1e-3, 10**-2.5, 1e-2, 10**-1.5),
      tests={
        f'{length}/{pairs}': dict(segments=((length, pairs, 1),))
        for length, pairs in BASED_TESTS
      },
      architectures={
        f'{name}-{width}': {
          'model.pattern': ('base_conv', name),
          'model.d_model': width,
        }
        for name in ('attention', 'gla', 'deltanet', 'gated_deltanet', 'rwkv7')
        for width in (64, 128, 256)
      },
      published={
        '': {'attention-64': 1.0, 'attention-128': 1.0, 'attention-256': 1.0}
        | {'gla-64': 0.53, 'gla-128': 0.77, 'gla-256': 0.95}
        | {'deltanet-64': 0.79, 'deltanet-128': 0.963, 'deltanet-256': 0.995}
        | {'gated_deltanet-64': 0.89, 'gated_deltanet-128': 0.99}
        | {'gated_deltanet-256': 0.994}
        | {'rwkv7-64': 0.815, 'rwkv7-128': 0.915, 'rwkv7-256': 0.98}
      },
      band=0.03,
      source='figure of the zoology repository',
    )
  return study | dict(
    learning_rates=(1e-4, 10**-3.33, 10**-2.67, 1e-2),
    tasks={
      f'{length}/{pairs}': {'data.options.segments': ((length, pairs, 1),)}
      for length, pairs in ZOOLOGY
    },
    architectures={
      name: {'model.pattern': (name,)}
      for name in ('attention', 'deltanet', 'gated_deltanet', 'gla', 'linear')
    },
    published={f'{n}/{pairs}': {'attention': 1.0} for n, pairs in ZOOLOGY},
    band=0.03,
    source='figure 2 of 2312.04927',
  )
