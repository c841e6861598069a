"""A grid is the runs that the trainer would make one by one."""

import dataclasses

import jax
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.config import ConfigError
from efficient_attn.train.grid import Grid, Run
from efficient_attn.train.metrics import read_metrics
from efficient_attn.train.objectives.cross_entropy import cross_entropy
from efficient_attn.train.trainer import run

CONFIG = configs.resolve(
  dict(
    steps=6,
    batch_size=8,
    accumulate=2,
    ema=0.5,
    log_every=1,
    model=dict(
      name='lm',
      d_model=16,
      num_layers=2,
      num_heads=2,
      vocab_size=32,
      pattern=('gla', 'attention'),
      mixers=dict(gla=dict(chunk_size=8)),
      ffn='none',
    ),
    data=dict(
      name='mqar',
      options=dict(vocab_size=32, segments=((16, 4, 1),)),
      valid_examples=20,
    ),
    optimizer=dict(warmup_steps=2),
  )
)
RUNS = [
  Run(learning_rate=lr, weight_decay=decay, seed=seed)
  for lr, decay, seed in (
    (1e-2, 0.1, 0),
    (1e-2, 0.1, 3),
    (3e-2, 0.0, 3),
  )
]


@pytest.mark.in_turn
# Three runs on two devices: one of them has a run that fills it up.
@pytest.mark.in_turn
@pytest.mark.parametrize(
  'devices', [pytest.param(1, marks=pytest.mark.exhaustive), 2]
)
def test_runs_of_a_grid_are_runs_of_the_trainer(devices, tmp_path):
  grid = Grid(CONFIG, RUNS, jax.devices()[:devices])
  for _ in range(2):
    grid.train(3)
  assert grid.losses.shape == (6, 3) and not grid.skipped.any()
  found = grid.evaluate()
  for i, one in enumerate(RUNS):
    config = dataclasses.replace(
      CONFIG,
      seed=one.seed,
      optimizer=dataclasses.replace(
        CONFIG.optimizer,
        learning_rate=one.learning_rate,
        weight_decay=one.weight_decay,
      ),
    )
    final = run(config, tmp_path / str(i), jax.devices()[:1])
    losses = [
      row['train/loss']
      for row in read_metrics(tmp_path / str(i))
      if 'train/loss' in row
    ]
    np.testing.assert_allclose(grid.losses[:, i], losses, rtol=1e-4)
    assert set(final) == {'loss', 'accuracy', 'macro_accuracy'}
    for name, value in final.items():
      assert found[i][name] == pytest.approx(value, rel=1e-3), name


@pytest.mark.in_turn
def test_a_diverging_run_does_not_touch_the_others():
  wild = Run(learning_rate=1e30, weight_decay=0.0, seed=0)
  config = dataclasses.replace(
    CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, name='sgd')
  )
  alone = Grid(config, RUNS[:1], jax.devices()[:1])
  both = Grid(config, [RUNS[0], wild], jax.devices()[:1])
  for grid in (alone, both):
    grid.train(6)
  np.testing.assert_allclose(both.losses[:, 0], alone.losses[:, 0], rtol=1e-5)
  assert both.skipped[0] == 0 < both.skipped[1]


@pytest.mark.in_turn
def test_tests_with_other_options():
  grid = Grid(CONFIG, RUNS[:1], jax.devices()[:1])
  longer = dataclasses.replace(
    CONFIG.data,
    valid_options=dict(segments=((32, 6, 1),)),  # more answers, too
    valid_examples=5,
  )
  (found,) = grid.evaluate(longer)
  assert 0 <= found['accuracy'] < 0.5
  dataset = data.load(longer, batch_size=5)
  (batch,) = dataset.valid
  logits, _ = grid.model(0)(batch['tokens'])
  _, nll = cross_entropy(logits, batch['labels'])
  assert batch['weights'].sum() == 5 * 6
  wanted = (nll * batch['weights']).sum() / (5 * 6)
  assert found['loss'] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize('key', ['init_from.run', 'teacher.run'])
def test_runs_of_a_grid_begin_anew(key):
  config = configs.resolve(configs.override({'model': {}}, {key: 'runs/a'}))
  with pytest.raises(ConfigError, match=f"{key}='runs/a' is not for a grid"):
    Grid(config, [])
