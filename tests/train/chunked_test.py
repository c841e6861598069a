"""Losses of logits that are computed by chunks equal those of all at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.layers.embed import Embed
from efficient_attn.models import cost
from efficient_attn.train.objectives import chunked, make_objective
from efficient_attn.train.objectives.tokens import _token_sums
from efficient_attn.train.state import Architecture

B, T, D, V = 4, 9, 8, 40
WIDER = 48  # the teacher's vocabulary


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
  monkeypatch.setattr(chunked, 'MIN_TOKENS', 8)  # the last one is not full
  monkeypatch.setattr(chunked, 'LOGITS', 1)


def case(teaches):
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((B, T, D), np.float32)
  targets = dict(
    labels=rng.integers(V, size=(B, T)),
    weights=(rng.random((B, T)) < 0.7).astype(np.float32),
    bytes=rng.integers(5, size=(B, T)),
  )
  teacher = None
  if teaches:
    other = Embed(WIDER, 2 * D, rngs=nnx.Rngs(1))
    teacher = other, rng.standard_normal((B, T, 2 * D), np.float32)
  loss = functools.partial(
    _token_sums,
    config=configs.LossConfig(label_smoothing=0.1, z_loss=0.01),
    teacher=configs.TeacherConfig(weight=0.3, temperature=2.0),
    by_class=True,
  )
  return loss, hidden, targets, teacher


def gradients(sums):
  """Returns the sums and their gradients, of a head and hidden vectors."""

  def objective(head, hidden):
    found = sums(head, hidden)
    return found['objective'], found

  return jax.jit(jax.grad(objective, (0, 1), has_aux=True))


@pytest.mark.parametrize('teaches', [False, True])
@pytest.mark.parametrize('mesh', ['', 'data=2,fsdp=2,tensor=2'])
def test_chunks_equal_all_at_once(mesh, teaches):
  loss, hidden, targets, teacher = case(teaches)
  head = Embed(V, D, rngs=nnx.Rngs(0))

  def dense(head, hidden):
    guide = teacher and teacher[0].logits(teacher[1])
    return loss(head.logits(hidden), targets, guide)

  def by_chunks(head, hidden):
    return chunked.sum_over_tokens(loss, head, hidden, targets, teacher)

  wanted = gradients(dense)(head, hidden)
  if mesh:
    devices = sharding.make_mesh(mesh, jax.devices()[:8])
    with jax.set_mesh(devices):
      found = gradients(by_chunks)(head, hidden)
  else:
    found = gradients(by_chunks)(head, hidden)
    # Two rows of the batch and more are never there at once.
    size = cost.largest_array(gradients(by_chunks), head, hidden)
    assert size < 8 * (WIDER if teaches else V) + B * T * 2 * D
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6),
    found,
    wanted,
  )


def test_second_derivatives():
  """Sophia multiplies the Hessian of the objective by a vector."""
  loss, hidden, targets, _ = case(False)
  head = Embed(V, D, rngs=nnx.Rngs(0))

  def dense(hidden):
    return loss(head.logits(hidden), targets, None)['objective']

  def by_chunks(hidden):
    found = chunked.sum_over_tokens(loss, head, hidden, targets)
    return found['objective']

  products = [
    jax.jit(lambda x, f=f: jax.jvp(jax.grad(f), (x,), (x**2,))[1])(hidden)
    for f in (by_chunks, dense)
  ]
  np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_not_the_largest_array_of_a_step(tied, monkeypatch):
  monkeypatch.undo()
  config = configs.resolve(
    dict(
      model=dict(
        vocab_size=32_000, d_model=768, num_layers=1, tie_embeddings=tied
      ),
      data=dict(seq_len=2048),
    )
  )
  architecture = Architecture(config.model)
  objective = make_objective(config)
  ids = jax.ShapeDtypeStruct((4, 2049), jnp.int32)
  batch = dict(tokens=ids, segment_ids=ids, positions=ids)

  def loss(params, batch):
    model = architecture.merge(params)
    return objective(model, batch, None)['objective']

  largest = cost.largest_array(
    jax.grad(loss), architecture.abstract_params(), batch
  )
  assert largest == 32_000 * 768, largest
