"""A grid of runs as one program, against the same runs one after another.

MQAR in 64 tokens at d_model 64, two layers, 12 runs: four learning rates and
three seeds. `alone` is the same program with one run; `trainer` is all of
`trainer.run`, which also compiles, logs, evaluates and saves.
"""

import itertools
import tempfile
import time

from efficient_attn import config as configs
from efficient_attn.train import trainer
from efficient_attn.train.grid import Grid, Run
from experiments.benchmarks.timing import interleaved

CONFIG = dict(
  model=dict(
    name='lm', d_model=64, num_layers=2, num_heads=2, vocab_size=64, ffn='none'
  ),
  data=dict(
    name='mqar',
    options=dict(vocab_size=64, segments=((64, 8, 1),)),
    valid_examples=64,
  ),
  batch_size=32,
  steps=200,
)
RUNS = [
  Run(learning_rate=rate, weight_decay=0.1, seed=seed)
  for rate, seed in itertools.product((1e-3, 3e-3, 1e-2, 3e-2), (0, 1, 2))
]
STEPS = 20  # a call


def measure(rounds: int) -> dict[str, float]:
  """Returns milliseconds a step and ratios for two mixers."""
  found = {}
  for name in ('attention', 'deltanet'):
    config = configs.resolve(
      configs.override(CONFIG, {'model.pattern': (name,)})
    )
    grids = {'grid': Grid(config, RUNS), 'alone': Grid(config, RUNS[:1])}
    seconds = interleaved({k: stepping(g) for k, g in grids.items()}, rounds)
    for kind, value in seconds.items():
      found[f'{name}_{kind}_step_ms'] = 1e3 * value / STEPS
    found[f'{name}_grid_over_alone'] = (
      len(RUNS) * seconds['alone'] / seconds['grid']
    )
    whole = {'grid': whole_grid(config), 'trainer': whole_trainer(config)}
    found |= {f'{name}_{k}_run_s': value for k, value in whole.items()}
    found[f'{name}_grid_over_trainer'] = (
      len(RUNS) * whole['trainer'] / whole['grid']
    )
  return found


def stepping(grid: Grid):
  """Returns a call that trains for `STEPS` steps."""

  def train():
    grid.train(STEPS)  # waits for the losses
    return ()

  return train


def whole_grid(config) -> float:
  """Seconds of all runs as one program, with compiling and evaluating."""
  start = time.perf_counter()
  grid = Grid(config, RUNS)
  while grid.steps < config.steps:
    grid.train(STEPS)
  grid.evaluate()
  return time.perf_counter() - start


def whole_trainer(config) -> float:
  """Seconds of one of them by the trainer."""
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    trainer.run(config, folder)
  return time.perf_counter() - start
