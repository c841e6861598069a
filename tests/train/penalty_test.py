"""What mixers add to the objective moves their parameters, and only those."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture, first_state
from efficient_attn.train.step import make_train_step

N, WINDOW, REACH, RATE, WEIGHT = 2, 8, 4, 0.5, 0.25
OPTIONS = {
  'adaptive_span': dict(window=WINDOW, ramp=4, span=0.5),
  'duo': dict(window=4, num_sinks=1),
  'dam': dict(reach=REACH),
}


def after_a_step(weight, mesh='', **changes):
  """The parameters and metrics after one step of plain gradient descent."""
  options = {k: v | {'penalty_weight': weight} for k, v in OPTIONS.items()}
  model = dict(
    d_model=16,
    num_heads=N,
    num_layers=6,
    vocab_size=16,
    pattern=tuple(OPTIONS),
    mixers=options,
    dtype='float32',
  )
  optimizer = dict(
    name='sgd',
    learning_rate=RATE,
    schedule='constant',
    clip_norm=0.0,
    weight_decay=0.0,
    options=dict(momentum=0.0),
  )
  config = configs.resolve(dict(batch_size=4, model=model, optimizer=optimizer))
  config = dataclasses.replace(config, **changes)
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  tokens = jax.random.randint(jax.random.key(1), (4, 13), 0, 16)
  batch = dict(tokens=tokens, segment_ids=jnp.ones_like(tokens))
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )

  def run(key, batch):
    params = architecture.initial_params(key)
    duo = params['stack']['periods']['blocks'][1]['mixer']
    duo['alpha'] = jnp.full_like(duo['alpha'], 0.5)  # inside [0, 1]
    return step(first_state(config, optimizer, params, key), batch)

  if mesh:
    mesh = sharding.make_mesh(mesh, jax.devices()[:4])
    with jax.set_mesh(mesh):
      return jax.jit(run)(jax.random.key(0), batch)
  return jax.jit(run)(jax.random.key(0), batch)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'changes',
  [
    {'accumulate': 2, 'mesh': 'data=2,tensor=2'},
    pytest.param({}, marks=pytest.mark.exhaustive),
  ],
  ids=str,
)
def test_penalties_add_their_gradient(changes):
  state, metrics = after_a_step(WEIGHT, **changes)
  before, plain = after_a_step(0.0)
  np.testing.assert_allclose(metrics['loss'], plain['loss'], rtol=1e-5)
  likely = jax.nn.sigmoid(1.0)
  moves = {
    ('adaptive_span', 'span'): WINDOW / N,
    ('duo', 'alpha'): 1.0,
    ('dam', 'alpha'): likely * (1 - likely) / (N * (2 * REACH + 1)),
  }
  found = jax.tree.map(jnp.subtract, state.params, before.params)
  for block, name in enumerate(OPTIONS):
    mixer = found['stack']['periods']['blocks'][block]['mixer']
    for path, move in jax.tree.leaves_with_path(mixer):
      parameter = path[-1].key
      expected = -RATE * WEIGHT * moves.get((name, parameter), 0.0)
      np.testing.assert_allclose(move, expected, atol=2e-6, err_msg=parameter)
