"""A run that was stopped, against one that was not: equal bit for bit?

On a GPU, XLA_FLAGS=--xla_gpu_deterministic_ops=true is part of the promise.
"""

import pathlib
import tempfile

import jax
import numpy as np

from efficient_attn import config as configs
from efficient_attn.train.load import load_model
from efficient_attn.train.trainer import run

VALUES = dict(
  batch_size=8,
  log_every=1,
  eval_batches=1,
  ema=0.9,
  model=dict(
    name='lm',
    d_model=64,
    num_layers=2,
    num_heads=4,
    pattern=('gated_deltanet', 'attention'),
    dropout=0.1,
  ),
  data=dict(seq_len=128),
  optimizer=dict(schedule='constant'),
)
STEPS, STOP = 8, 4


def measure(rounds: int) -> dict[str, float]:
  """Returns how many parameters differ after `STEPS` steps; 0 is right."""
  del rounds
  with tempfile.TemporaryDirectory() as folder:
    whole, part = (pathlib.Path(folder) / name for name in ('whole', 'part'))
    train(whole, STEPS)
    train(part, STOP)
    train(part, STEPS)
    pairs = list(zip(parameters(whole), parameters(part), strict=True))
  differ = sum(int((a != b).sum()) for a, b in pairs)
  found = dict(parameters=sum(a.size for a, _ in pairs), differ=differ)
  if differ:
    raise AssertionError(f'a resumed run is another run: {found}')
  return found


def train(workdir: pathlib.Path, steps: int) -> None:
  """Trains, or continues, to `steps` steps."""
  run(configs.resolve(VALUES | {'steps': steps}), workdir, jax.devices()[:1])


def parameters(workdir: pathlib.Path) -> list[np.ndarray]:
  """Returns what a run ended with."""
  return list(map(np.asarray, jax.tree.leaves(load_model(workdir)[1])))
