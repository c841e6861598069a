"""The encoder of tokens: both sides, padding, tied layers, factors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import models
from efficient_attn.config import ConfigError, EncoderConfig
from tests.layers.built import filled

B, T, VOCAB = 2, 9, 32
BASE = dict(d_model=16, num_heads=2, num_layers=2, vocab_size=VOCAB)
BERT = dict(
  norm='layernorm',
  norm_position='post',
  position='learned',
  max_len=T,
  ffn='mlp',
  ffn_bias=True,
  activation='gelu',
  mixers={'attention': dict(position='none', qkv_bias=True, out_bias=True)},
)
TOKENS = jax.random.randint(jax.random.key(1), (B, T), 0, VOCAB)


def build(**changes):
  config = EncoderConfig(**BASE | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


@jax.jit
def call(model, tokens, **options):
  logits, none = model(tokens, **options)
  assert none is None
  return logits


def test_each_token_is_named_by_those_on_both_sides():
  model = build(pattern=('attention', 'gla'))
  logits = call(model, TOKENS)
  assert logits.shape == (B, T, VOCAB) and logits.dtype == jnp.float32
  for t in (0, T - 1):
    other = call(model, TOKENS.at[:, t].add(1) % VOCAB)
    assert (other != logits).any(-1).all()
  with pytest.raises(NotImplementedError, match='has no cache'):
    build().init_cache(B, T)


@pytest.mark.parametrize('changes', [{}, BERT], ids=['pre', 'bert'])
def test_packed_and_padded_rows_are_apart(changes):
  model = build(**changes)
  ids = jnp.array([[1, 1, 1, 2, 2, 0, 0, 0, 0], [1] * 4 + [2] * 5])
  packed = call(model, TOKENS, segment_ids=ids)
  for row, size in ((0, 3), (1, 4)):
    for at in (slice(size), slice(size, 5 if row == 0 else T)):
      alone = call(model, TOKENS[row : row + 1, at])
      np.testing.assert_allclose(packed[row, at], alone[0], atol=1e-5)


def test_tied_layers_are_layers_of_equal_parameters():
  options = BERT | dict(num_layers=4, pattern=('attention', 'retention'))
  tied = build(**options, share_layers=True)
  names = [path for path, _ in nnx.to_flat_state(nnx.state(tied))]
  assert {path[2] for path in names if 'periods' in path} == {0}
  assert len(list(tied.stack.layers())) == 4
  params = nnx.to_pure_dict(nnx.state(tied))
  wanted = call(tied, TOKENS)
  stacked = jax.tree.map(
    lambda x: jnp.stack([x, x]), params['stack']['periods'][0]
  )
  free = nnx.eval_shape(lambda: build(**options))
  free = nnx.merge(nnx.graphdef(free), params | {'stack': {'periods': stacked}})
  np.testing.assert_allclose(call(free, TOKENS), wanted, atol=1e-5)
  # Unrolled, and computed again in the backward pass.
  for changes in (dict(scan_layers=False), dict(remat='full')):
    other = nnx.eval_shape(
      lambda c=changes: build(**options, **c, share_layers=True)
    )
    other = nnx.merge(nnx.graphdef(other), params)
    np.testing.assert_allclose(call(other, TOKENS), wanted, atol=1e-5)


@pytest.mark.parametrize('tie_embeddings', [True, False])
def test_factors_are_one_table(tie_embeddings):
  """ALBERT's embeddings are [V, E] [E, D], and so are its logits'."""
  model = build(embed_dim=4, tie_embeddings=tie_embeddings)
  hidden, _ = model.hidden(TOKENS)
  table = (model.embed if tie_embeddings else model.unembed).table[...]
  table = table @ model.widen.weight[...]
  np.testing.assert_allclose(
    call(model, TOKENS), hidden @ table.T * (4 / 16) ** 0.5, atol=1e-4
  )


def test_parameters_by_hand():
  D, E, F = 16, 4, 64
  config = EncoderConfig(**BASE | BERT, embed_dim=E, share_layers=True)
  layer = 4 * (D * D + D) + 2 * D * F + F + D + 4 * D
  front = (VOCAB + T) * E + 2 * E + E * D + D
  assert models.parameter_count(config) == front + layer


def test_it_learns_the_masked_tokens_of_a_batch():
  config = EncoderConfig(**BASE | dict(embed_dim=8, share_layers=True))
  graphdef, params = nnx.split(models.init(config, jax.random.key(0)))
  tx = optax.adam(1e-2)
  weights = jnp.arange(T) % 3 == 1
  masked = jnp.where(weights, VOCAB - 1, TOKENS)

  def loss(params):
    logits, _ = nnx.merge(graphdef, params)(masked)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS)
    return jnp.sum(each * weights) / (B * jnp.sum(weights))

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(loss)(params)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), length=80)[1]

  losses = run(params)
  assert 2 < losses[0] < 8 and losses[-1] < 0.05


def test_wrong_configurations():
  with pytest.raises(ConfigError, match="'fox' is causal only; for an encoder"):
    build(pattern=('fox',))
  for key, value, message in (
    ('embed_dim', -1, 'model.embed_dim=-1 must be >= 0'),
    ('share_layers', 2, 'model.share_layers=2 is a int'),
    ('num_layers', 3, 'model.num_layers=3 is not a multiple of the 2 layers'),
  ):
    model = dict(
      name='encoder', pattern='attention,gla', share_layers=True, num_layers=4
    )
    with pytest.raises(ConfigError, match=message):
      configs.resolve({'model': model | {key: value}})
