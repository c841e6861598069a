"""The encoder and decoder: cache, causality, packing, layouts, mistakes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import models
from efficient_attn.config import ConfigError, EncoderDecoderConfig
from efficient_attn.decode.generate import generate
from efficient_attn.layers.context import Context
from efficient_attn.train import check
from tests.layers.built import filled

B, S, T, VOCAB = 2, 7, 9, 32
BASE = dict(
  d_model=16,
  num_heads=2,
  num_layers=2,
  vocab_size=VOCAB,
  pattern=('attention', 'retention'),
  mixers={'retention': {'chunk_size': 4}},
)
KEYS = jax.random.split(jax.random.key(0), 3)
SOURCE = jax.random.randint(KEYS[0], (B, S), 0, VOCAB)
TARGET = jax.random.randint(KEYS[1], (B, T), 0, VOCAB)
PADDED = jnp.asarray(np.arange(S) < [[S], [4]], jnp.int32)


def recipe(**changes):
  config = EncoderDecoderConfig(**BASE | changes)
  return lambda: models.build(config, rngs=nnx.Rngs(0))


@functools.cache
def plain():
  return build()


def build(**changes):
  return filled(recipe(**changes))


@jax.jit
def forward(model, source, target, **options):
  logits, none = model(target, source, **options)
  assert none is None
  return logits


@jax.jit
def start(model, source, source_ids):
  return model.init_cache(source, T, source_ids=source_ids)


@jax.jit
def step(model, target, cache):
  return model(target, cache=cache)


VARIANTS = {
  'plain': {},
  'other encoder': dict(
    num_layers=1, encoder_layers=2, encoder_pattern=('fnet',), mixers={}
  ),
  'post': dict(
    num_layers=1, norm_position='post', norm='layernorm', position='sinusoidal'
  ),
  'learned': dict(
    num_layers=2,
    pattern=('attention',),
    mixers={},
    position='learned',
    max_len=T,
    ffn='mlp',
    tie_embeddings=False,
  ),
}


@pytest.mark.parametrize('name', sorted(VARIANTS))
def test_cached_equals_uncached(name):
  model = build(**VARIANTS[name]) if VARIANTS[name] else plain()
  ids = PADDED if name == 'plain' else None
  whole = forward(model, SOURCE, TARGET, source_ids=ids)
  assert whole.shape == (B, T, VOCAB) and whole.dtype == jnp.float32
  cache = start(model, SOURCE, ids)
  parts = []
  for a, b in itertools.pairwise((0, 4, 5, T)):
    logits, cache = step(model, TARGET[:, a:b], cache)
    parts.append(logits)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-4)
  assert cache.cursor.length == T


def test_what_each_target_sees():
  model = plain()
  logits = forward(model, SOURCE, TARGET)
  later = forward(model, SOURCE, TARGET.at[:, 5:].add(1) % VOCAB)
  np.testing.assert_array_equal(later[:, :5], logits[:, :5])
  assert (later[:, 5:] != logits[:, 5:]).any(-1).all()
  # Both halves see every source, also before and after the target's index.
  for s in (0, S - 1):
    changed = forward(model, SOURCE.at[:, s].add(1) % VOCAB, TARGET)
    assert (changed != logits).any(-1).all(), s


def test_padding_is_not_seen():
  model = build(position='learned', max_len=T)
  logits = forward(model, SOURCE, TARGET, source_ids=PADDED)
  for row, size in enumerate((S, 4)):
    at = slice(row, row + 1)
    alone = forward(model, SOURCE[at, :size], TARGET[at])
    np.testing.assert_allclose(logits[at], alone, atol=1e-5)
  # Padding in front of sources and targets does not move them either.
  before = jnp.roll(SOURCE, 3, 1), jnp.roll(PADDED, 3, 1)
  ids = jnp.asarray(np.arange(T) >= [[0], [2]], jnp.int32)
  shifted = jnp.stack([TARGET[0], jnp.roll(TARGET[1], 2)])
  found = forward(
    model, before[0], shifted, source_ids=before[1], segment_ids=ids
  )
  np.testing.assert_allclose(found[1, 2:], logits[1, :-2], atol=1e-5)


def test_nothing_leaves_the_padding_of_a_memory():
  model = build(pattern=('attention',), mixers={}, num_layers=1)
  cross = next(model.stack.blocks()).cross
  x = jax.random.normal(KEYS[0], (B, T, 16))
  memory = jax.random.normal(KEYS[1], (B, S, 16))

  def read(x, memory):
    context = Context(memory=memory, memory_ids=PADDED)
    return cross(x, context)[0]

  y, gradient = jax.vjp(read, x, memory)
  bad = jnp.where(PADDED[..., None] == 0, jnp.nan, memory)
  y_bad, gradient_bad = jax.vjp(read, x, bad)
  np.testing.assert_array_equal(y, y_bad)
  for a, b in zip(gradient(y), gradient_bad(y), strict=True):
    np.testing.assert_array_equal(a, b)
  assert (gradient(y)[1][1, 4:] == 0).all()


@pytest.mark.in_turn
def test_packed_pairs_are_apart():
  model = build(position='learned', max_len=T)
  source_ids = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2, 2]])
  ids = jnp.array([[1, 1, 2, 2, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 2, 2]])
  packed = forward(
    model, SOURCE, TARGET, source_ids=source_ids, segment_ids=ids
  )
  for row, number in itertools.product(range(B), (1, 2)):
    source = SOURCE[row][source_ids[row] == number][None]
    target = TARGET[row][ids[row] == number][None]
    alone = forward(model, source, target)
    np.testing.assert_allclose(
      packed[row][ids[row] == number], alone[0], atol=1e-5
    )


@pytest.mark.in_turn
def test_scanned_equals_unrolled_and_recomputed():
  base = dict(num_layers=2, pattern=('attention',), mixers={})
  scanned = build(**base)
  params = nnx.to_pure_dict(nnx.state(scanned))

  def unrolled(stack):
    periods = {
      i: jax.tree.map(lambda x, i=i: x[i], stack['periods']) for i in range(2)
    }
    return stack | {'periods': periods}

  others = {
    'unrolled': dict(scan_layers=False),
    'recomputed': dict(remat='full'),
  }
  wanted = forward(scanned, SOURCE, TARGET, source_ids=PADDED)
  grads = jax.jit(jax.grad(loss))(scanned)
  for name, changes in others.items():
    graphdef = nnx.graphdef(nnx.eval_shape(recipe(**base, **changes)))
    values = params
    if name == 'unrolled':
      values = params | {
        'stack': unrolled(params['stack']),
        'encoder': params['encoder']
        | {'stack': unrolled(params['encoder']['stack'])},
      }
    model = nnx.merge(graphdef, values)
    found = forward(model, SOURCE, TARGET, source_ids=PADDED)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    if name == 'recomputed':
      for a, b in zip(
        jax.tree.leaves(jax.jit(jax.grad(loss))(model)),
        jax.tree.leaves(grads),
        strict=True,
      ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def loss(model, source_ids=PADDED):
  logits, _ = model(TARGET[:, :-1], SOURCE, source_ids=source_ids)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, TARGET[:, 1:])
  return each.mean()


@pytest.mark.in_turn
def test_it_learns_a_batch():
  model = models.init(EncoderDecoderConfig(**BASE), KEYS[2])
  tx = optax.adam(1e-2)
  graphdef, params = nnx.split(model)

  @jax.jit
  def run(params):
    def body(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(
        lambda params: loss(nnx.merge(graphdef, params))
      )(params)
      updates, state = tx.update(grads, state)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(body, (params, tx.init(params)), length=60)[1]

  losses = run(params)
  assert losses[0] > 3 and losses[-1] < 0.05


@pytest.mark.in_turn
def test_generate_reads_sources_of_unequal_length():
  model = plain()
  begin = jnp.full((B, 1), 3)
  options = dict(length=5, temperature=0)
  found = generate(
    model, begin, KEYS[0], source=SOURCE, source_ids=PADDED, **options
  )
  said = jnp.concatenate([begin, found[:, :-1]], axis=1)
  logits = forward(model, SOURCE, said, source_ids=PADDED)
  np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))
  # Targets that have begun differently end together.
  prompt = jnp.array([[5, 3], [7, 3]])
  found = generate(
    model,
    prompt,
    KEYS[0],
    prompt_lengths=[1, 2],
    source=SOURCE,
    source_ids=PADDED,
    **options,
  )
  said = jnp.concatenate([prompt[:1, 1:], found[:1, :-1]], axis=1)
  logits = forward(model, SOURCE[:1], said)
  np.testing.assert_array_equal(found[:1], jnp.argmax(logits, axis=-1))


def test_dropout_needs_a_key_and_follows_it():
  model = build(dropout=0.5, num_layers=1)
  calm = forward(model, SOURCE, TARGET)
  one, same, other = (
    forward(model, SOURCE, TARGET, key=key)
    for key in (KEYS[0], KEYS[0], KEYS[1])
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()
  assert (one != calm).any()


def test_parameters_by_hand():
  make = recipe(ffn='mlp', pattern=('attention',), mixers={}, encoder_layers=1)
  state = nnx.state(nnx.eval_shape(make), nnx.Param)
  size = sum(p.size for p in jax.tree.leaves(state))
  attention, ffn = 4 * 16 * 16, 8 * 16 * 16
  encoder = attention + ffn + 2 * 16 + 16
  assert size == VOCAB * 16 + encoder + 2 * (2 * attention + ffn + 3 * 16) + 16


def test_mixers_of_the_encoder_count():
  options = dict(
    encoder_pattern=('adaptive_span',),
    mixers={'adaptive_span': {'penalty_weight': 0.5}},
  )
  assert models.penalty(build(**options)) != 0
  model = BASE | options | {'name': 'encoder_decoder'}
  config = check.complete(configs.resolve({'model': model}))
  assert 'ramp' in config.model.mixers['adaptive_span']
  unknown = configs.resolve({'model': model | {'encoder_pattern': 'adaptve'}})
  with pytest.raises(ConfigError, match="^model.encoder_pattern='adaptve'"):
    check.complete(unknown)


def test_wrong_configurations():
  for changes, message in (
    (dict(pattern=('fnet',), encoder_pattern=('attention',)), 'of encoders'),
    (
      dict(pattern=('fox',)),
      r"^model.encoder_pattern=\(\): 'fox' is causal only",
    ),
    (
      dict(encoder_pattern=('fox',)),
      r"^model.encoder_pattern=\('fox',\): 'fox' is causal only",
    ),
    (
      dict(encoder_pattern=('attenton',)),
      "^model.encoder_pattern='attenton' is unknown; did you mean 'attention'",
    ),
  ):
    with pytest.raises(ConfigError, match=message):
      recipe(mixers={}, **changes)()
  for key in ('encoder_layers', 'encoder_pattern'):
    with pytest.raises(ConfigError, match=f'model.{key}'):
      configs.resolve({'model': {'name': 'encoder_decoder', key: -1}})
  short = build(position='learned', max_len=S - 1, num_layers=1)
  with pytest.raises(ConfigError, match='raise model.max_len'):
    forward(short, SOURCE, TARGET[:, :3])
  with pytest.raises(ValueError, match='either the source or a cache'):
    plain()(TARGET)
