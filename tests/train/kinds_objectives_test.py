"""What each kind of model reads of its batches, and which tokens count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from scipy.special import log_softmax

from efficient_attn import config as configs
from efficient_attn import models, sharding
from efficient_attn.models.spec import KINDS
from efficient_attn.train.objectives import OBJECTIVES
from tests.layers.built import filled

B, S, T, VOCAB = 2, 6, 5, 16
RNG = np.random.default_rng(0)


def ids(size, *lengths):
  return jnp.asarray(np.arange(size) < np.array(lengths)[:, None], jnp.int32)


def tokens(size):
  return jnp.asarray(RNG.integers(1, VOCAB, (B, size)), jnp.int32)


MASKED = dict(
  tokens=tokens(S),
  labels=tokens(S),
  weights=jnp.asarray(RNG.random((B, S)) < 0.5, jnp.float32),
  segment_ids=jnp.array([[3, 3, 3, 4, 4, 4], [5, 5, 6, 6, 0, 0]]),
  positions=jnp.array([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 0, 1]]),
)
SPANS = dict(
  inputs=tokens(S),
  input_segment_ids=ids(S, 6, 4),
  targets=tokens(T + 1),
  target_segment_ids=ids(T + 1, 4, 6),
)
LABELLED = dict(
  tokens=tokens(S),
  label=jnp.array([2, 0]),
  weight=jnp.array([1.0, 0.0]),
  segment_ids=ids(S, 6, 3),
)
BATCHES = {
  'masked_tokens': MASKED,
  'target_tokens': SPANS,
  'classification': LABELLED,
}


def test_every_default_objective_exists():
  used = {name for kind in KINDS.values() for name in kind.objectives.values()}
  assert used == set(OBJECTIVES)


def made(kind, objective, packing='concat', **model):
  config = configs.resolve(
    dict(
      model=dict(
        name=kind,
        d_model=8,
        num_heads=2,
        num_layers=1,
        vocab_size=VOCAB,
        dtype='float32',
        **model,
      ),
      data=dict(packing=packing),
    )
  )
  model = filled(lambda: models.build(config.model, rngs=nnx.Rngs(0)))
  run = OBJECTIVES[objective](config, None)
  sums = jax.jit(functools.partial(run, key=None))
  return model, jax.device_get(sums(model, BATCHES[objective]))


def nll(logits, labels, weights):
  logs = log_softmax(np.asarray(logits, np.float64), axis=-1)
  each = -np.take_along_axis(logs, np.asarray(labels)[..., None], -1)[..., 0]
  return (each * np.asarray(weights)).sum()


@pytest.mark.parametrize('packing', ['concat', 'segments'])
def test_masked_tokens(packing):
  model, sums = made('encoder', 'masked_tokens', packing, position='learned')
  batch = MASKED
  options = dict(segment_ids=jnp.minimum(batch['segment_ids'], 1))
  if packing == 'segments':
    options = {k: batch[k] for k in ('segment_ids', 'positions')}
  logits, _ = model(batch['tokens'], **options)
  wanted = nll(logits, batch['labels'], batch['weights'])
  np.testing.assert_allclose(sums['loss'], wanted, rtol=1e-5)
  assert sums['weight'] == batch['weights'].sum()
  assert sums['tokens_read'] == B * S


@pytest.mark.in_turn
def test_target_tokens():
  model, sums = made('encoder_decoder', 'target_tokens')
  wanted = 0
  for row, (source, target) in enumerate(((6, 4), (4, 6))):
    read = SPANS['targets'][row : row + 1, :target]
    given = SPANS['inputs'][row : row + 1, :source]
    logits, _ = model(read[:, :-1], given)
    wanted += nll(logits, read[:, 1:], 1)
  np.testing.assert_allclose(sums['loss'], wanted, rtol=1e-5)
  assert sums['weight'] == 3 + 5


@pytest.mark.parametrize(
  'model', [{}, dict(causal=True, pooling='last'), dict(pattern='fnet')]
)
def test_classes_of_sequences(model):
  pads = 'pattern' not in model
  model, sums = made('classifier', 'classification', **model)
  options = dict(segment_ids=LABELLED['segment_ids']) if pads else {}
  logits = model(LABELLED['tokens'], **options)
  wanted = nll(logits, LABELLED['label'], LABELLED['weight'])
  np.testing.assert_allclose(sums['loss'], wanted, rtol=1e-5)
  assert sums['weight'] == 1 and sums['tokens_read'] == B * S


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'kind,objective,options',
  [
    ('encoder', 'masked_tokens', dict(embed_dim=4, share_layers=True)),
    ('encoder_decoder', 'target_tokens', dict(position='learned')),
    ('classifier', 'classification', dict(norm_position='post')),
  ],
)
def test_sharded_equals_unsharded(kind, objective, options):
  config = configs.resolve(
    dict(
      model=dict(
        name=kind,
        d_model=8,
        num_heads=2,
        num_layers=2,
        vocab_size=VOCAB,
        dtype='float32',
        **options,
      )
    )
  )
  model = filled(lambda: models.build(config.model, rngs=nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  run = OBJECTIVES[objective](config, None)

  def loss(params, batch):
    return run(nnx.merge(graphdef, params), batch, None)['objective']

  batch = BATCHES[objective]
  wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
  mesh = sharding.make_mesh('data=2,tensor=2', jax.devices()[:4])
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, sharding.activation_spec(('batch',)))
    params = jax.tree.map(
      lambda p: jax.device_put(p, NamedSharding(mesh, place(p))),
      params,
      is_leaf=lambda p: isinstance(p, nnx.Param),
    )
    found = jax.jit(jax.value_and_grad(loss))(
      params, jax.device_put(batch, rows)
    )
  for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def place(p):
  """Where a parameter is stored, behind the layers of a scanned stack."""
  return P(*[None] * (p.ndim - len(p.axes)), *sharding.param_spec(p.axes))
