"""A model of experts is trained: penalties, loads, corrections, every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.layers.capture import captured
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.state import Architecture, first_state
from efficient_attn.train.step import make_train_step

RATE, E, K, VOCAB = 0.01, 4, 2, 16
TOKENS = jax.random.randint(jax.random.key(1), (8, 9), 0, VOCAB)
IDS = jnp.ones_like(TOKENS).at[:, 6:].set(2).at[0, 4:].set(0)
BATCH = dict(tokens=TOKENS, segment_ids=IDS, positions=jnp.zeros_like(TOKENS))


def run_of(name='adamw', accumulate=1, **router):
  experts = dict(
    num_experts=E,
    top_k=K,
    router=dict(correction=True, balance_rate=RATE) | router,
  )
  return configs.resolve(
    dict(
      batch_size=8,
      accumulate=accumulate,
      data=dict(packing='segments'),
      model=dict(
        name='lm',
        d_model=16,
        num_layers=3,
        num_heads=2,
        vocab_size=VOCAB,
        ffn_dim=16,
        first_ffns=('glu',),
        ffn='moe',
        ffns={'moe': experts},
        dtype='float32',
      ),
      optimizer=dict(name=name, learning_rate=0.1, schedule='constant'),
    )
  )


@functools.cache
def after_a_step(mesh='', **changes):
  """The parameters before, those after, and the metrics."""
  config = run_of(**changes)
  architecture = Architecture(config.model)
  optimizer = architecture.optimizer(config)
  step = make_train_step(
    config, architecture, optimizer, make_objective(config)
  )

  def run(key, batch):
    params = architecture.initial_params(key)
    state, metrics = step(first_state(config, optimizer, params, key), batch)
    return params, state.params, metrics

  if mesh:
    with jax.set_mesh(sharding.make_mesh(mesh)):
      return jax.jit(run)(jax.random.key(0), BATCH)
  return jax.jit(run)(jax.random.key(0), BATCH)


def loads_by_layer(params):
  """The tokens of each expert, by the paths of the routers."""
  model = Architecture(run_of().model).merge(params)
  context = dict(segment_ids=IDS[:, :-1], positions=BATCH['positions'][:, :-1])
  run = jax.jit(captured(model.hidden, 'expert_load'))
  return run(TOKENS[:, :-1], **context)[1]['expert_load']


def routers(params):
  """Those of layers 1 and 2, stacked."""
  return params['stack']['periods']['blocks'][0]['ffn']['router']


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_corrections_move_against_the_excess(name):
  before, after, metrics = after_a_step(name=name)
  loads = loads_by_layer(before)
  assert [len(x) for x in loads] == [E, E]  # of the layers behind the first
  for correction, load in zip(routers(after)['correction'], loads, strict=True):
    assert load.sum() == K * (IDS[:, :-1] > 0).sum()
    moved = -RATE * np.sign(load - load.mean())
    np.testing.assert_allclose(correction, moved, atol=1e-7)
  wanted = max((x / x.mean()).max() for x in loads)
  np.testing.assert_allclose(metrics['max_expert_load'], wanted, rtol=1e-6)
  assert metrics['idle_experts'] == np.mean(np.concatenate(loads) == 0)
  assert (routers(before)['weight'] != routers(after)['weight']).any()


@pytest.mark.in_turn
def test_the_penalty_moves_the_router_and_is_reported():
  plain = after_a_step(name='sgd', balance_weight=0.0)
  added = after_a_step(name='sgd', balance_weight=1.0, z_weight=0.1)
  assert plain[2]['penalty'] == 0 < added[2]['penalty']
  np.testing.assert_allclose(plain[2]['loss'], added[2]['loss'], rtol=1e-6)
  one, two = (routers(found[1])['weight'] for found in (plain, added))
  assert jnp.abs(one - two).max() > 1e-5


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'changes', [dict(mesh='data=2,fsdp=2,tensor=2'), dict(accumulate=2)], ids=str
)
def test_how_a_step_is_computed_does_not_matter(changes):
  """Without penalties, which are means over each micro-batch."""
  options = dict(name='sgd', balance_weight=0.0)
  _, wanted, metrics = after_a_step(**options)
  _, found, others = after_a_step(**options, **changes)
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=1e-4, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted
  )


def test_metrics_of_loads_by_hand():
  sums = {
    'expert_load.0': np.asarray([3.0, 1.0, 0.0, 0.0]),
    'expert_load.1': np.asarray([1.0, 1.0]),
    'penalty': 6.0,
    'weight': 4.0,
    'loss': 8.0,
    'correct': 1.0,
  }
  found = means(sums)
  assert found['max_expert_load'] == 3
  assert found['penalty'] == 1.5
  np.testing.assert_allclose(found['idle_experts'], 2 / 6)
