"""Losses and what a step reports and averages, against plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax, logsumexp

from efficient_attn import config as configs
from efficient_attn.models import cost
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.objectives.cross_entropy import cross_entropy
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.state import Architecture, first_state
from efficient_attn.train.step import evaluated_params, make_train_step


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('z', [0.0, 0.01])
@pytest.mark.parametrize('rows', [1, 4])
def test_cross_entropy(rows, smoothing, z):
  rng = np.random.default_rng(0)
  logits = 3 * rng.standard_normal((rows, 5, 7))
  labels = rng.integers(0, 7, (rows, 5))
  objective, nll = cross_entropy(
    jnp.asarray(logits, jnp.float32),
    jnp.asarray(labels),
    label_smoothing=smoothing,
    z_loss=z,
  )
  logs = log_softmax(logits, axis=-1)
  plain = -np.take_along_axis(logs, labels[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, plain, rtol=1e-5)
  target = (1 - smoothing) * plain - smoothing * logs.mean(-1)
  target += z * logsumexp(logits, axis=-1) ** 2
  np.testing.assert_allclose(objective, target, rtol=1e-5)


CONFIG = configs.resolve(
  dict(
    batch_size=2,
    ema=0.75,
    model=dict(d_model=8, num_layers=1, num_heads=2, vocab_size=8),
    data=dict(name='palindrome'),
    optimizer=dict(name='sgd', learning_rate=0.5),
  )
)
ARCHITECTURE = Architecture(CONFIG.model)


class LogitsModel(nnx.Module):
  """A model whose logits are given."""

  def __init__(self, logits):
    self.given = jnp.asarray(logits)
    self.head = Identity()

  def hidden(self, tokens, **_):
    return jnp.broadcast_to(
      self.given, (*tokens.shape, self.given.shape[-1])
    ), None


class Identity(nnx.Module):
  def logits(self, x):
    return x


def test_sums_of_answers():
  """Only weighted positions count, and only classes that occur."""
  rng = np.random.default_rng(1)
  logits = rng.standard_normal((2, 10, 8)).astype(np.float32)
  labels = rng.integers(0, 3, (2, 10))  # five classes never occur
  weights = (rng.random((2, 10)) < 0.4).astype(np.float32)
  logits[0] += 9 * np.eye(8)[labels[0]]  # a row that is right
  batch = dict(tokens=labels, labels=labels, weights=weights)
  found = means(make_objective(CONFIG)(LogitsModel(logits), batch, None))
  hits = logits.argmax(-1) == labels
  counted = weights > 0
  assert 0 < hits[counted].mean() < 1
  np.testing.assert_allclose(found['accuracy'], hits[counted].mean(), rtol=1e-6)
  each = [hits[counted & (labels == c)].mean() for c in range(3)]
  np.testing.assert_allclose(found['macro_accuracy'], np.mean(each), rtol=1e-6)
  nll = -np.take_along_axis(log_softmax(logits, -1), labels[..., None], -1)
  np.testing.assert_allclose(
    found['loss'], nll[..., 0][counted].mean(), rtol=1e-5
  )


@pytest.mark.parametrize('model', ['lm', 'auto_encoder'])
def test_logits_at_answers_alone_are_enough(model):
  """Answers by example: the most, fewer and none."""
  config = configs.resolve(
    dict(
      model=dict(
        name=model, d_model=8, num_layers=1, num_heads=2, vocab_size=16
      ),
      data=dict(
        name='mqar', options=dict(vocab_size=16, segments=((12, 3, 1),))
      ),
      loss=dict(label_smoothing=0.1),
    )
  )
  architecture = Architecture(config.model)
  params = architecture.initial_params(jax.random.key(0))
  rng = np.random.default_rng(0)
  weights = np.zeros((3, 12), np.float32)
  weights[0, [2, 7, 11]], weights[1, 5] = 1, 1
  tokens, labels = rng.integers(16, size=(2, 3, 12))
  batch = dict(tokens=tokens, labels=labels, weights=weights)
  loss = make_objective(config)

  def found(params):
    sums = loss(architecture.merge(params), batch, None)
    return sums['objective'], sums

  def wanted(params):
    logits, _ = architecture.merge(params)(tokens)
    objective, nll = cross_entropy(logits, labels, label_smoothing=0.1)
    hits = jnp.argmax(logits, -1) == labels
    sums = dict(loss=nll * weights, correct=hits * weights, weight=weights)
    return jnp.sum(objective * weights), jax.tree.map(jnp.sum, sums)

  values = [jax.jit(jax.grad(f, has_aux=True))(params) for f in (found, wanted)]
  (gradient, sums), (other_gradient, other_sums) = values
  for name, value in other_sums.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-5, err_msg=name)
  assert sums['tokens_read'] == 36 and sums['of_class'].sum() == 4
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    gradient,
    other_gradient,
  )


def test_only_answers_get_logits():
  config = configs.resolve(
    dict(
      model=dict(d_model=8, num_layers=1, num_heads=2, vocab_size=4096),
      data=dict(name='mqar', options=dict(vocab_size=4096)),
    )
  )
  architecture = Architecture(config.model)
  params = jax.eval_shape(architecture.initial_params, jax.random.key(0))
  batch = {name: np.zeros((2, 64), int) for name in ('tokens', 'labels')}
  batch['weights'] = np.zeros((2, 64), np.float32)
  loss = make_objective(config)

  def forward(params):
    return loss(architecture.merge(params), batch, None)

  logits_of_all = 2 * 64 * 4096
  assert cost.largest_array(forward, params) < logits_of_all / 10


def test_sums_of_next_tokens():
  """Padding and the first token of another segment are no targets."""
  config = dataclasses.replace(CONFIG, data=configs.DataConfig(seq_len=4))
  ids = np.array([[1, 1, 2, 2, 0]])
  logits = np.zeros((1, 4, 8), np.float32)
  logits[0, :, 3] = 1
  batch = dict(tokens=np.full((1, 5), 3), segment_ids=ids)
  sums = make_objective(config)(LogitsModel(logits), batch, None)
  assert sums['weight'] == 2 and sums['tokens_read'] == 4
  found = means(sums)
  assert found['accuracy'] == 1
  np.testing.assert_allclose(
    found['loss'], -log_softmax(logits[0, 0])[3], rtol=1e-6
  )


def test_a_step_averages_the_new_parameters():
  optimizer = ARCHITECTURE.optimizer(CONFIG)
  loss = make_objective(CONFIG)
  step = jax.jit(make_train_step(CONFIG, ARCHITECTURE, optimizer, loss))
  params = ARCHITECTURE.initial_params(jax.random.key(0))
  state = first_state(CONFIG, optimizer, params, jax.random.key(0))
  tokens = np.arange(20).reshape(2, 10) % 8
  weights = np.tile(np.arange(10) % 2, (2, 1)).astype(np.float32)
  batch = dict(tokens=tokens, labels=tokens, weights=weights)
  average = params
  for _ in range(2):
    state, metrics = step(state, batch)
    average = jax.tree.map(
      lambda a, p: 0.75 * a + 0.25 * p, average, state.params
    )
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, params, state.params))
  assert moved > 0.1
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    evaluated_params(state),
    average,
  )
  assert metrics['weight'] == 10 and metrics['tokens_read'] == 20
