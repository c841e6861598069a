"""Recall against memory on MQAR: the figure of the zoology repository.

  python launch/ablate.py --config=configs/ablations/based.py --out=runs/based

The settings of its code, after Based (2402.18668): a short convolution, then
the mixer, 180k examples of 4 to 64 pairs, accuracy over tests of up to 256
pairs. It has 2.8e17 FLOPs of products: 8 GPU-hours at 10 TFLOP/s (an estimate
from the count).

Differences: dropout is that of embeddings and residual branches here, of
embeddings and attention weights there; initial values are this framework's; a
run does not stop early. Segments are mixed and an answer counts alike in all of
them (there one segment follows the other, and a batch is of one), and
gated_deltanet has an output gate.
"""

import ml_collections

SEGMENTS = (
  # Length, pairs, thousands of examples.
  (64, 4, 100),
  (128, 8, 20),
  (256, 16, 20),
  (256, 32, 20),
  (256, 64, 20),
)
TESTS = (
  (64, 4),
  (64, 8),
  (64, 16),
  (128, 32),
  (256, 64),
  (512, 128),
  (1024, 256),
)
# By mixer, the accuracy over all tests by width; read off the figure.
PUBLISHED = {
  'attention': {32: 1.0, 64: 1.0, 128: 1.0},
  'gla': {64: 0.53, 128: 0.77, 256: 0.95},
  'deltanet': {64: 0.79, 128: 0.963, 256: 0.995},
  'gated_deltanet': {64: 0.89, 128: 0.99, 256: 0.994},
  'rwkv7': {64: 0.815, 128: 0.915, 256: 0.98},
}
EXAMPLES, EPOCHS, BATCH = 180_000, 32, 256


def get_config() -> ml_collections.ConfigDict:
  """The run that the study varies."""
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=64, num_layers=2, num_heads=2, vocab_size=8192
  )
  config.model.update(ffn='none', norm='layernorm', dropout=0.1)
  config.model.mixers = dict(
    attention=dict(position='none', qkv_bias=True, out_bias=True),
    gated_deltanet=dict(expand_k=1.0, expand_v=2.0),
    rwkv7=dict(decay_rank=16, rate_rank=16, gate_rank=64),
  )
  config.data = dict(name='mqar', train_examples=EXAMPLES)
  config.data.options = dict(
    vocab_size=8192, segments=SEGMENTS, random_non_queries=True
  )
  config.optimizer = dict(weight_decay=0.1, clip_norm=0.0)
  config.update(steps=EPOCHS * EXAMPLES // BATCH, batch_size=BATCH)
  return config


def sweep() -> dict:
  """What is compared."""

  def row(name, width):
    return {
      'model.pattern': ('base_conv', name),
      'model.d_model': width,
      'model.num_heads': width // 64 if name == 'rwkv7' else 2,
    }

  published = {
    f'{name} {width}': value
    for name, values in PUBLISHED.items()
    for width, value in values.items()
  }
  return dict(
    title='Recall against memory, as published',
    architectures={
      f'{name} {width}': row(name, width)
      for name, values in PUBLISHED.items()
      for width in values
    },
    tests={
      f'{length}/{pairs}': dict(segments=((length, pairs, 1),))
      for length, pairs in TESTS
    },
    learning_rates=(1e-3, 10**-2.5, 1e-2, 10**-1.5),
    seeds=(0,),
    published={'': published},
    band=0.03,
    source='the recall-memory figure of the zoology repository',
  )
