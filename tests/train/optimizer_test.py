import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax import contrib

from efficient_attn.config import ConfigError, OptimizerConfig
from efficient_attn.train.optimizer import (
  OPTIMIZERS,
  SCHEDULES,
  eval_params,
  make_optimizer,
  make_schedule,
)

Axes = contrib.MuonDimensionNumbers
STEPS = 200
# Stacked layers of a projection to heads, one from heads, an embedding, and
# the scales of norms.
SHAPES = {'q': (3, 16, 4, 8), 'o': (3, 4, 8, 16), 'embed': (32, 16), 's': (16,)}
MATRICES = {
  'q': Axes((1,), (2, 3)),
  'o': Axes((1, 2), (3,)),
  'embed': None,
  's': None,
}
MASK = {'q': True, 'o': True, 'embed': True, 's': False}
SPECS = {
  'q': P(None, 'fsdp', 'tensor'),
  'o': P(None, 'tensor', None, 'fsdp'),
  'embed': P('tensor', 'fsdp'),
  's': P('fsdp'),
}
# Learning rates at which each moves; those of sgd and adafactor are relative.
RATES = {'sgd': 0.5, 'adafactor': 0.1, 'schedule_free': 0.1}


def normal(seed, dtype='float32', shapes=None):
  rng = np.random.default_rng(seed)
  shapes = shapes or SHAPES
  return {k: jnp.asarray(rng.normal(size=s), dtype) for k, s in shapes.items()}


def quadratic(params):
  return sum(jnp.sum(jnp.square(x)) / x.size for x in params.values())


def least_squares(params):
  """A linear attention-shaped map, fitted to another one."""
  x = jnp.asarray(np.random.default_rng(7).normal(size=(32, 16)), 'float32')

  def outputs(p):
    heads = jnp.einsum('bd,ldnh->lbnh', x * p['s'], p['q'] / 4)
    return jnp.einsum('lbnh,lnhd->lbd', heads, p['o'] / 6), x @ p['embed'].T / 4

  pairs = zip(outputs(params), outputs(normal(8)), strict=True)
  return sum(jnp.mean(jnp.square(y - target)) for y, target in pairs)


def build(name, mask=MASK, matrices=MATRICES, **changes):
  config = {
    'learning_rate': RATES.get(name, 0.01),
    'schedule': 'constant',
    'clip_norm': 0.0,
    'weight_decay': 0.0,
  }
  config = OptimizerConfig(name=name, **config | changes)
  return make_optimizer(config, STEPS, mask, matrices)


def train(optimizer, loss, params, steps):
  """Returns params and state after some jitted steps with donated buffers."""

  def step(params, state):
    grads = jax.grad(loss)(params)
    updates, state = optimizer.update(grads, state, params, obj_fn=loss)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, params)
  state = optimizer.init(params)
  types = jax.tree.map(jax.typeof, (params, state))
  for _ in range(steps):
    params, state = step(params, state)
    assert jax.tree.map(jax.typeof, (params, state)) == types
  return params, state


def first_update(optimizer, grads, params):
  update = jax.jit(optimizer.update)
  return update(grads, optimizer.init(params), params)[0]


def assert_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(
      np.asarray(a, 'float64'), np.asarray(e, 'float64'), **tolerance
    ),
    actual,
    expected,
  )


# Schedules.


def expected(name, step, peak, warmup, steps, final, cooldown):
  if step < warmup:
    return peak * step / warmup
  if name == 'constant':
    return peak
  done = (step - warmup) / (steps - warmup)
  if name == 'cosine':
    return peak * (final + (1 - final) * (1 + np.cos(np.pi * done)) / 2)
  if name == 'wsd':
    done = max(0, 1 - (steps - step) / (cooldown * steps))
  return peak * (1 - (1 - final) * done)


@pytest.mark.parametrize('warmup', [0, 1, 20])
@pytest.mark.parametrize('name', SCHEDULES)
def test_schedule_is_its_formula(name, warmup):
  config = OptimizerConfig(
    learning_rate=0.3,
    schedule=name,
    warmup_steps=warmup,
    cooldown=0.25,
    final_fraction=0.1,
  )
  steps = np.array([0, 1, 10, 20, 21, 60, 74, 75, 76, 90, 99, 100])
  actual = jax.vmap(make_schedule(config, 100))(steps)
  formula = [expected(name, s, 0.3, warmup, 100, 0.1, 0.25) for s in steps]
  np.testing.assert_allclose(actual, formula, rtol=1e-5)


def test_schedule_ends_at_zero_by_default():
  schedule = make_schedule(OptimizerConfig(), 50)
  assert schedule(49) > 0 and schedule(50) == 0


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'schedule': 'cosin'}, "optimizer.schedule='cosin'.*'cosine'"),
    ({'warmup_steps': 50}, 'warmup_steps=50 must .* below steps=50'),
    ({'warmup_steps': -1}, 'warmup_steps=-1 must be >= 0'),
    (
      {'schedule': 'wsd', 'warmup_steps': 20, 'cooldown': 0.7},
      'cooldown=0.7 must be at most 0.6',
    ),
  ],
)
def test_schedule_errors(changes, message):
  with pytest.raises(ConfigError, match=message):
    make_schedule(OptimizerConfig(**changes), 50)


# Optimizers.


@pytest.mark.parametrize(
  'loss, dtype', [(quadratic, 'bfloat16'), (least_squares, 'float32')]
)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_loss_decreases(name, loss, dtype):
  optimizer = build(name, weight_decay=0.1, clip_norm=10.0)
  params, state = train(optimizer, loss, normal(0, dtype), 40)
  before, after = loss(normal(0)), loss(eval_params(state, params))
  assert after < 0.9 * before


def cosine(step):
  return optax.cosine_decay_schedule(0.01, STEPS)(step)


BARE = {
  'adamw': optax.adamw(cosine, b2=0.95, weight_decay=0.1, mask=MASK),
  'lion': optax.lion(cosine, b2=0.95, weight_decay=0.1, mask=MASK),
  'adafactor': optax.adafactor(
    cosine,
    min_dim_size_to_factor=8,
    weight_decay_rate=lambda step: 0.1 * cosine(step),
    weight_decay_mask=MASK,
  ),
  'muon': contrib.muon(
    cosine,
    ns_steps=3,
    consistent_rms=0.2,
    weight_decay=0.1,
    muon_weight_dimension_numbers=MATRICES,
  ),
  'sophia': contrib.sophia(
    cosine, update_interval=2, weight_decay=0.1, weight_decay_mask=MASK
  ),
  'schedule_free': contrib.schedule_free_adamw(cosine, b1=0.95),
  'sgd': optax.chain(  # optax.sgd has no decay
    optax.trace(0.9),
    optax.add_decayed_weights(0.1, MASK),
    optax.scale_by_learning_rate(cosine),
  ),
}
OPTIONS = {
  'adamw': {'b2': 0.95},
  'lion': {'b2': 0.95},
  'adafactor': {'min_dim_size_to_factor': 8},
  'muon': {'ns_steps': 3},
  'sophia': {'update_interval': 2},
  'schedule_free': {'b1': 0.95},
  'sgd': {'momentum': 0.9},
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_are_those_of_optax_also_when_sharded(name):
  changes = {'options': OPTIONS[name], 'learning_rate': 0.01}
  changes |= {'schedule': 'cosine', 'clip_norm': 0.1}
  if name != 'schedule_free':  # optax has no mask there
    changes |= {'weight_decay': 0.1}
  mask = MASK | {'embed': False} if name == 'muon' else MASK  # nor here
  ours = build(name, mask, **changes)
  bare = optax.chain(optax.clip_by_global_norm(0.1), BARE[name])
  wanted, _ = train(bare, quadratic, normal(0), 3)
  actual, _ = train(ours, quadratic, normal(0), 3)
  assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
  assert not np.allclose(actual['q'], normal(0)['q'], atol=1e-4)

  with jax.set_mesh(jax.make_mesh((4, 2), ('fsdp', 'tensor'))):
    params = {k: jax.device_put(x, SPECS[k]) for k, x in normal(0).items()}
    sharded, _ = train(ours, quadratic, params, 3)
  assert_close(sharded, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_decay_is_decoupled_and_masked(name):
  """Without gradients, w becomes (1 - learning_rate * weight_decay) w."""
  optimizer = build(name, learning_rate=0.2, weight_decay=0.1, schedule='wsd')
  actual, state = train(optimizer, lambda p: 0.0 * p['s'][0], normal(0), 1)
  if name == 'schedule_free':
    actual = state.z
  wanted = {k: x * (0.98 if MASK[k] else 1.0) for k, x in normal(0).items()}
  assert_close(actual, wanted, rtol=1e-5)


def test_clipping_by_global_norm():
  grads = normal(1)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
  for limit, factor in [(0.5, 0.5 / norm), (2 * norm, 1.0), (0.0, 1.0)]:
    sgd = build('sgd', clip_norm=float(limit), learning_rate=1.0)
    updates = first_update(sgd, grads, grads)
    assert_close(updates, {k: -factor * g for k, g in grads.items()}, rtol=1e-5)


def test_muon_of_stacked_layers_is_muon_of_each():
  """And a weight with several output axes is one matrix."""
  flat = {'q': (16, 32), 'o': (32, 16)}

  def slices(tree):
    return {
      f'{name}{layer}': tree[name][layer].reshape(shape)
      for name, shape in flat.items()
      for layer in range(3)
    }

  stacked = first_update(build('muon'), normal(1), normal(0))
  grads, params = slices(normal(1)), slices(normal(0))
  alone = build(
    'muon',
    {name: True for name in params},
    {name: Axes((0,), (1,)) for name in params},
  )
  wanted = first_update(alone, grads, params)
  assert_close(slices(stacked), wanted, rtol=1e-5, atol=1e-7)


def test_muon_updates_are_orthogonal_and_of_the_size_of_adam():
  grads = normal(1)
  updates = first_update(build('muon', learning_rate=1.0), grads, normal(0))
  for layer in range(3):
    singular = np.linalg.svd(updates['q'][layer].reshape(16, 32))[1]
    assert singular.max() < 2 * singular.min()
  assert 0.1 < np.sqrt(np.mean(np.square(updates['q']))) < 0.3
  for name in ('embed', 's'):  # the first update of adam is a scaled sign
    np.testing.assert_array_equal(np.sign(updates[name]), -np.sign(grads[name]))
    np.testing.assert_allclose(np.abs(updates[name]), 1.4737, rtol=1e-3)


def test_sophia_asks_for_the_loss():
  sophia = build('sophia')
  with pytest.raises(ValueError, match='obj_fn must be provided'):
    sophia.update(normal(1), sophia.init(normal(0)), normal(0))


def test_eval_params_are_the_average_of_schedule_free():
  optimizer = build('schedule_free', clip_norm=1.0)
  params, state = train(optimizer, quadratic, normal(0), 3)
  assert_close(
    eval_params(state, params),
    {k: (params[k] - 0.1 * z) / 0.9 for k, z in state[1].z.items()},
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize('name', sorted(set(OPTIMIZERS) - {'schedule_free'}))
def test_eval_params_are_the_parameters_of_the_others(name):
  params = normal(0)
  assert eval_params(build(name).init(params), params) is params


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('adamv', {}, "optimizer.name='adamv'.*'adamw'"),
    ('adamw', {'beta2': 0.9}, 'options.beta2=0.9 .* adamw; valid: b1, b2'),
    ('sgd', {'nestrov': True}, "options.nestrov=True .* sgd; .*'nesterov'"),
    ('adamw', {'learning_rate': 1.0}, 'options.learning_rate=1.0 is not'),
    ('muon', {'adam_learning_rate': 1.0}, 'options.adam_learning_rate=1.0'),
    ('schedule_free', {'lr': 1.0}, 'options.lr=1.0 is not'),
  ],
)
def test_unknown_names(name, options, message):
  with pytest.raises(ConfigError, match=message) as error:
    build(name, options=options)
  assert '\n' not in str(error.value)


def test_muon_options_win_over_ours():
  muon = build('muon', options={'consistent_rms': None}, learning_rate=1.0)
  updates = first_update(muon, normal(1), normal(0))
  assert np.abs(np.linalg.norm(updates['q'][0].reshape(16, 32), 2)) > 0.9


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_learning_rates_are_vmapped(name):
  """So that a grid of learning rates is one program."""

  def updates(rate):
    optimizer = build(name, learning_rate=rate, schedule='cosine')
    return first_update(optimizer, normal(1), normal(0))

  both = jax.vmap(updates)(jnp.array([0.01, 0.02]))
  for i, rate in enumerate([0.01, 0.02]):
    alone = {k: x[i] for k, x in both.items()}
    assert_close(alone, updates(rate), rtol=1e-4, atol=1e-7)
