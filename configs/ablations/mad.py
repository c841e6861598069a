"""The six tasks of MAD (2403.17844).

  python launch/ablate.py --config=configs/ablations/mad.py:tiny --out=runs/mad

`tiny` has two of them, with 64 tokens. The full study has the protocol of its
code: two mixers and two SwiGLU layers of width 128, 200 epochs, the best of six
pairs of learning rate and weight decay for each of the 66 settings, and the
score of a task is the mean over its settings. It has 2.3e18 FLOPs of products:
64 GPU-hours at 10 TFLOP/s (an estimate from the count).

Differences: runs do not stop early, and it draws its own examples.
"""

import ml_collections

from efficient_attn.config import words

COUNTS = (6400, 3200, 1600, 800)  # training examples; 12,800 at first
LENGTHS = (256, 512, 1024)
WORDS = (32, 64, 128)
RECALL = dict(vocab_size=WORDS, seq_len=LENGTHS, examples=COUNTS)
# Task: its options at first, and what is changed one at a time.
TASKS = {
  'in_context_recall': (dict(vocab_size=16, seq_len=128), RECALL),
  'fuzzy_recall': (dict(vocab_size=16, seq_len=128), RECALL),
  'noisy_recall': (
    dict(vocab_size=32, seq_len=128),
    RECALL | dict(vocab_size=(48, 80, 144), noise=(0.4, 0.6, 0.8)),
  ),
  'selective_copying': (
    dict(vocab_size=16, seq_len=256, copied=16),
    RECALL | dict(seq_len=(512, 1024), copied=(32, 64, 96)),
  ),
  'compression': (
    dict(vocab_size=16, seq_len=32),
    RECALL | dict(seq_len=(64, 128, 256)),
  ),
  'memorization': (
    dict(vocab_size=256, seq_len=32, examples=256),
    dict(vocab_size=(512, 1024, 2048, 4096, 8192)),
  ),
}
# Means over the settings of a task (2406.06484), as shares, in this order.
PUBLISHED = {
  'attention': (0.941, 0.298, 0.868, 0.996, 0.516, 0.852),
  'mamba': (0.904, 0.067, 0.901, 0.863, 0.527, 0.895),
  'gla': (0.808, 0.069, 0.816, 0.886, 0.388, 0.633),
  'deltanet': (1.0, 0.357, 1.0, 1.0, 0.422, 0.528),
}
# What a mixer of the full study has beside its name.
ROWS = {
  'attention': {'model.num_heads': 16},
  'mamba': {'model.mixers.mamba': dict(d_state=4)},
}
BATCH, EPOCHS = 128, 200
# Steps and options of the tasks of `tiny`.
TINY = {
  'in_context_recall': (800, dict(seq_len=64)),
  'selective_copying': (300, dict(seq_len=64, copied=8)),
}


def settings(name: str) -> dict[str, dict]:
  """Returns the options of every setting of a task, by its name."""
  first, changes = TASKS[name]
  found = {name: first}
  for key, values in changes.items():
    found |= {f'{name} {key}={v}': first | {key: v} for v in values}
  return found


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """The run that the study varies."""
  tiny = 'tiny' in words(arg, 'tiny')
  config = ml_collections.ConfigDict()
  config.model = dict(name='lm', d_model=128, num_layers=2, num_heads=8)
  config.data = dict(valid_examples=1280)
  config.optimizer = dict(final_fraction=1e-3)
  config.update(batch_size=BATCH)
  if tiny:
    config.model.update(d_model=64, num_heads=4)
    config.data.valid_examples = 256
    config.optimizer.warmup_steps = 50
    config.batch_size = 32
  return config


def _changes(name, options):
  """Returns the changed keys of a setting."""
  options = dict(options)
  examples = options.pop('examples', 12_800)
  special = name == 'fuzzy_recall'  # the filler is a token more
  changes = {
    'data.name': name,
    'data.options': options,
    'data.train_examples': examples,
    'model.vocab_size': options['vocab_size'] + special,
    'steps': EPOCHS * examples // BATCH,
  }
  if name == 'compression':
    changes['model.name'] = 'auto_encoder'
  return changes


def sweep(arg: str = '') -> dict:
  """What is compared."""
  study = dict(
    title='Tasks of mechanistic architecture design', metric='macro_accuracy'
  )
  if 'tiny' in words(arg, 'tiny'):
    return study | dict(
      tasks={
        name: {
          'data.name': name,
          'data.options': options,
          'model.vocab_size': 16,
          'steps': steps,
        }
        for name, (steps, options) in TINY.items()
      },
      architectures={
        name: {'model.pattern': (name,)}
        for name in ('attention', 'deltanet', 'linear')
      },
      learning_rates=(1e-3, 3e-3, 1e-2),
      weight_decays=(0.0,),
    )
  return study | dict(
    tasks={
      setting: _changes(name, options)
      for name in TASKS
      for setting, options in settings(name).items()
    },
    groups={name: tuple(settings(name)) for name in TASKS},
    architectures={
      name: {'model.pattern': (name,)} | ROWS.get(name, {})
      for name in PUBLISHED
    },
    learning_rates=(1e-4, 5e-4, 1e-3),
    weight_decays=(0.0, 0.1),
    seeds=(0,),
    published={
      task: {name: row[i] for name, row in PUBLISHED.items()}
      for i, task in enumerate(TASKS)
    },
    band=0.03,
    source='2406.06484, table of MAD',
  )
