"""A run of a second, and what there is to compare of it."""

import jax
import numpy as np

from efficient_attn import config as configs
from efficient_attn.train import trainer
from efficient_attn.train.load import load_model
from efficient_attn.train.metrics import read_metrics

TINY = dict(
  steps=6,
  batch_size=2,
  log_every=1,
  eval_every=2,
  eval_batches=1,
  checkpoint_every=2,
  model=dict(d_model=8, num_layers=1, num_heads=2, vocab_size=32),
  # JSON has no tuples and no keys that are numbers.
  data=dict(name='mqar', options=dict(vocab_size=32, segments=((16, 4, 1),))),
  optimizer=dict(learning_rate=0.01),
)


def tiny(**changes):
  return configs.resolve(configs.override(TINY, changes))


def run(workdir, **changes):
  return trainer.run(tiny(**changes), workdir, jax.devices()[:1])


def rows(workdir):
  """Returns what a row says of the model: the rest is about time."""
  kept = 'step', 'train/loss', 'train/grad_norm', 'valid/loss'
  found = read_metrics(workdir)
  return [{k: row[k] for k in kept if k in row} for row in found]


def contents(workdir):
  """Returns everything in a folder, with when it was written."""
  return {
    str(p): (p.stat().st_mtime_ns, p.is_file() and p.read_bytes())
    for p in [workdir, *workdir.rglob('*')]
  }


def assert_same_parameters(a, b):
  (_, a), (_, b) = load_model(a), load_model(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
