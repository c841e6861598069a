"""The six tasks of MAD (2403.17844).

  python launch/ablate.py --config=configs/ablations/mad.py:tiny --out=runs/mad

`tiny` has two of them, with 64 tokens. The full study has their settings: two
mixers and two SwiGLU layers of width 128, 200 epochs, the best of six pairs of
learning rate and weight decay, and wants an accelerator.
"""

import ml_collections

from efficient_attn.config import words

# Task: its vocabulary with special tokens, and examples to train on.
TASKS = {
  'in_context_recall': (16, 12_800),
  'fuzzy_recall': (17, 12_800),
  'noisy_recall': (32, 12_800),
  'selective_copying': (16, 12_800),
  'compression': (16, 12_800),
  'memorization': (256, 256),
}
# Means over the settings of a task (2406.06484), as shares.
PUBLISHED = {
  'attention': (0.941, 0.298, 0.868, 0.996, 0.516, 0.852),
  'mamba': (0.904, 0.067, 0.901, 0.863, 0.527, 0.895),
  'gla': (0.808, 0.069, 0.816, 0.886, 0.388, 0.633),
  'deltanet': (1.0, 0.357, 1.0, 1.0, 0.422, 0.528),
}
BATCH, EPOCHS = 128, 200
# Steps and options of the tasks of `tiny`.
TINY = {
  'in_context_recall': (800, dict(seq_len=64)),
  'selective_copying': (300, dict(seq_len=64, copied=8)),
}


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


def sweep(arg: str = '') -> dict:
  """What is compared."""
  tiny = 'tiny' in words(arg, 'tiny')

  def task(name):
    vocabulary, examples = TASKS[name]
    changes = {'data.name': name, 'model.vocab_size': vocabulary}
    if name == 'compression':
      changes['model.name'] = 'auto_encoder'
    if tiny:
      changes['steps'], changes['data.options'] = TINY[name]
    else:
      changes['data.train_examples'] = examples
      changes['steps'] = EPOCHS * max(examples // BATCH, 1)
    return changes

  rows = ('attention', 'deltanet', 'linear') if tiny else PUBLISHED
  return dict(
    title='Tasks of mechanistic architecture design',
    tasks={name: task(name) for name in (TINY if tiny else TASKS)},
    architectures={name: {'model.pattern': (name,)} for name in rows},
    learning_rates=(1e-3, 3e-3, 1e-2) if tiny else (1e-4, 5e-4, 1e-3),
    weight_decays=(0.0,) if tiny else (0.0, 0.1),
    metric='macro_accuracy',
    published={}
    if tiny
    else {
      task: {name: row[i] for name, row in PUBLISHED.items()}
      for i, task in enumerate(TASKS)
    },
    band=0.03,
    source='2406.06484, table of MAD',
  )
