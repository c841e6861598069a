"""Caches of a fixed number of tokens: what they hold, and what it costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.decode.eviction import POLICIES, Evicting, evict
from efficient_attn.decode.generate import generate
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.layers.mixers.softmax.weights import Softmax
from efficient_attn.layers.position import T5
from efficient_attn.layers.rotary import Rotary
from efficient_attn.ops import masks
from tests.launch.scripts import sample

NAMES = sorted(POLICIES)


@functools.cache
def model_of(*pattern, num_layers=1, **options):
  config = LMConfig(
    d_model=16,
    num_heads=4,
    num_layers=num_layers,
    vocab_size=256,
    pattern=pattern,
    scan_layers=True,
    mixers={pattern[0]: options},
  )
  return models.init(config, jax.random.key(0))


def plain():
  """Two layers scanned over."""
  return model_of(
    'attention', num_layers=2, num_kv_heads=2, sinks=True, gate='head'
  )


TOKENS = jax.random.randint(jax.random.key(5), (2, 24), 0, 32)


def decoded(model, tokens):
  """Logits of a prompt of 9, then of one token at a time."""
  cache = model.init_cache(*tokens.shape)
  first, cache = model(tokens[:, :9], cache=cache)

  def step(cache, token):
    logits, cache = model(token[:, None], cache=cache)
    return cache, logits[:, 0]

  _, logits = jax.lax.scan(step, cache, tokens[:, 9:].T)
  return jnp.concatenate([first, logits.swapaxes(0, 1)], axis=1)


@functools.cache
def logits_of(name):
  """Of TOKENS with a prompt of 9, the rest one at a time, at two budgets."""

  def run(model, tokens):
    if name is None:
      return model(tokens)[0]
    return [decoded(evict(model, name, n), tokens) for n in (6, 24)]

  return jax.jit(run)(plain(), TOKENS)


@pytest.mark.in_turn
@pytest.mark.parametrize('name', NAMES)
def test_a_budget_of_everything_is_plain_decoding(name):
  np.testing.assert_allclose(
    logits_of(name)[1], logits_of(None), rtol=1e-5, atol=2e-5
  )


@pytest.mark.parametrize(
  'options',
  [
    dict(position='t5', t5=T5(buckets=8, distance=16)),
    dict(position='alibi', num_kv_heads=2),
    dict(cosine=True, logits_soft_cap=2.0),
    dict(qk_norm=True, rotary=Rotary(fraction=0.5), gate='channel'),
    dict(position='none', num_kv_heads=1, head_dim=6),
  ],
  ids=str,
)
def test_a_budget_of_everything_is_plain_decoding_with_all_options(options):
  model = model_of('attention', **options)

  def decode(model, tokens):
    cache = model.init_cache(*tokens.shape)
    first, cache = model(tokens[:, :9], cache=cache)
    second, cache = model(tokens[:, 9:10], cache=cache)
    third, _ = model(tokens[:, 10:], cache=cache)
    return jnp.concatenate([first, second, third], 1)

  whole, held = jax.jit(lambda m, x: (m(x)[0], decode(evict(m, 'h2o', 24), x)))(
    model, TOKENS
  )
  np.testing.assert_allclose(held, whole, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
  'name, options',
  [
    ('star', {}),
    ('moa', dict(alpha=3, num_sinks=2)),
    ('longformer', dict(window=8, num_global=2)),
    ('entmax', {}),
    ('differential', dict(num_kv_heads=2)),
    ('additive', {}),
  ],
)
def test_every_cache_of_keys_and_values_can_be_evicted_from(name, options):
  model = model_of(name, **options)

  def run(model, tokens):
    held = [decoded(evict(model, 'h2o', n), tokens) for n in (24, 12)]
    return model(tokens)[0], *held

  whole, everything, half = jax.jit(run)(model, TOKENS)
  np.testing.assert_allclose(everything, whole, rtol=1e-5, atol=2e-5)
  # These lose nothing that a later query would see.
  lossless = name in ('star', 'longformer')
  assert (np.abs(half - whole).max() < 1e-5) == lossless


@pytest.mark.parametrize(
  'options',
  [
    dict(position='t5', t5=T5(buckets=8)),
    dict(cosine=True),
    dict(position='alibi'),
  ],
  ids=str,
)
def test_what_is_received_is_the_column_sum_of_the_map(options):
  mixer = model_of('attention', **options).stack.periods[0].blocks[0].mixer
  x = jax.random.normal(jax.random.key(1), (2, 7, 16))
  query, key, value = mixer.project(x, Context(), None)
  ids = jnp.broadcast_to(jnp.arange(7)[:, None], key.shape[:3])
  held = dict(key=key, value=value, position=ids)
  small = Evicting(mixer, 'h2o', 4)
  found = jax.jit(lambda: small.received(query, jnp.arange(7)[None], held))()
  # One key at a time holds a value: what is read of it is its weight.
  marks = jnp.broadcast_to(jnp.eye(7)[None, :, None], (2, 7, 4, 7))
  bias = mixer.bias(0)
  read = mixer.weights(query, key, marks, masks.Causal(), bias, mixer.scale)
  np.testing.assert_allclose(
    found, read.sum(1).swapaxes(1, 2), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('name', NAMES)
def test_less_costs_something_but_not_the_prompt(name):
  gap = np.abs(logits_of(name)[0] - logits_of(None)).max((0, 2))
  # What is evicted behind the prompt is missed by the token after it first.
  assert (gap[:9] < 2e-5).all() and (gap[9:] > 1e-4).all()


def test_greedy_tokens_are_those_of_plain_decoding():
  model = model_of('attention', 'attention:b', num_layers=3, qk_norm=True)
  found = [
    generate(m, TOKENS[:, :7], jax.random.key(0), length=9, temperature=0)
    for m in (model, evict(model, 'h2o', 16))
  ]
  np.testing.assert_array_equal(*found)


def maps(rows, known, query, key, sinks):
  """{token: what it receives from `rows`} for each kv head, and each map."""
  N, K = query.shape[1], key.shape[1]
  total = [dict.fromkeys(tokens, 0.0) for tokens in known]
  found = {}
  for t in rows:
    for n in range(N):
      k = n // (N // K)
      seen = [j for j in known[k] if j <= t]
      logits = np.array([query[t, n] @ key[j, k] for j in seen])
      p = np.exp(logits / np.sqrt(query.shape[2]))
      p = p / (p.sum() + np.exp(sinks[n]))
      found[t, n] = dict(zip(seen, p, strict=True))
      for j, x in found[t, n].items():
        total[k][j] += x
  return total, found


def smooth(row):
  values = [0, 0, *row.values(), 0, 0]
  means = [sum(values[i : i + 5]) / 5 for i in range(len(row))]
  return dict(zip(row, means, strict=True))


def oracle(name, query, key, value, logits, budget, prompt):
  """Positions held after every call, and outputs, of one sequence by loops."""
  (T, N, _), K = query.shape, key.shape[1]
  held, score = [[] for _ in range(K)], [{} for _ in range(K)]
  outs, history = np.zeros_like(query), []
  for call in [range(prompt), *([t] for t in range(prompt, T))]:
    end = call[-1] + 1
    known = [[*tokens, *call] for tokens in held]
    new, found = maps(call, known, query, key, logits)
    for (t, n), p in found.items():
      outs[t, n] = sum(x * value[j, n // (N // K)] for j, x in p.items())
    recent = sinks = 0
    if name == 'h2o':
      new = [
        {j: x + old.get(j, 0.0) for j, x in row.items()}
        for row, old in zip(new, score, strict=True)
      ]
      recent = budget // 2
    if name == 'snapkv':
      window = range(max(end - 32, 0), end)
      new = [smooth(row) for row in maps(window, known, query, key, logits)[0]]
      recent = min(32, budget // 2)
    if name == 'tova':  # all heads hold the same tokens
      new, _ = maps([end - 1], known, query, key, logits)
      new = [{j: np.mean([row[j] for row in new]) for j in new[0]}] * K
    if name == 'streaming_llm':
      new = [{j: float(j) for j in tokens} for tokens in known]
      sinks = min(4, budget // 2)
    for k, row in enumerate(new):
      worth = {
        j: np.inf if j < sinks or j >= end - recent else x
        for j, x in row.items()
      }
      held[k] = sorted(sorted(worth, key=lambda j: (-worth[j], j))[:budget])
      score[k] = row
    history.append([list(tokens) for tokens in held])
  return history, outs


@pytest.mark.parametrize('name', NAMES)
def test_holds_exactly_what_the_policy_says(name):
  T, prompt, budget = 43, 9, 8
  with jax.enable_x64(True):
    mixer = Attention(
      d_model=16,
      num_heads=4,
      num_kv_heads=2,
      weights=functools.partial(Softmax, sinks=True),
      causal=True,
      rngs=nnx.Rngs(0),
    )
    sinks = np.array([-1.0, 0.0, 1.0, 2.0])
    mixer.weights.sinks[...] = jnp.asarray(sinks)
    x = 3 * jax.random.normal(jax.random.key(1), (2, T, 16), jnp.float64)

    def run(mixer, x):
      small = Evicting(mixer, name, budget)
      cache = small.init_cache(2, T, x.dtype)
      first, cache = small(x[:, :prompt], cache=cache)

      def step(cache, x):
        y, cache = small(x[:, None], cache=cache)
        return cache, (y[:, 0], cache.held['position'])

      last, (ys, positions) = jax.lax.scan(
        step, cache, x[:, prompt:].swapaxes(0, 1)
      )
      y = jnp.concatenate([first, ys.swapaxes(0, 1)], axis=1)
      positions = jnp.concatenate([cache.held['position'][None], positions])
      return mixer.project(x, Context(), None), y, positions, last.cursor.length

    run = jax.jit(run)
    arrays, y, positions, length = run(mixer, x)
    assert length == T and positions.shape == (35, 2, budget, 2)
    for b in range(2):
      qkv = (np.asarray(a[b], np.float64) for a in arrays)
      history, outs = oracle(name, *qkv, sinks, budget, prompt)
      np.testing.assert_array_equal(positions[:, b].swapaxes(1, 2), history)
      np.testing.assert_allclose(
        y[b], mixer.out(jnp.asarray(outs)[None])[0], rtol=1e-6, atol=1e-6
      )
  if name == 'streaming_llm':
    wanted = [0, 1, 2, 3, *range(T - 4, T)]
    np.testing.assert_array_equal(positions[-1, 0, :, 0], wanted)


def test_prompts_shorter_than_the_budget_fill_up():
  mixer = Attention(d_model=16, num_heads=4, causal=True, rngs=nnx.Rngs(0))
  small = Evicting(mixer, 'tova', 5)
  x = jax.random.normal(jax.random.key(1), (1, 8, 16))
  step = jax.jit(lambda x, cache: small(x, cache=cache)[1])
  cache = small.init_cache(1, 99, jnp.float32)
  for t in range(8):
    cache = step(x[:, t : t + 1], cache)
    held = (cache.held['position'] >= 0).sum(1)
    assert (held == min(t + 1, 5)).all()
  assert small.init_cache(1, 3, jnp.float32).held['key'].shape == (1, 3, 4, 4)
  # Without a cache it is the mixer itself.
  run = jax.jit(lambda mixer, x: mixer(x)[0])
  np.testing.assert_array_equal(run(small, x), run(mixer, x))


@pytest.mark.parametrize(
  'model, policy, budget, error, message',
  [
    (('gla', 'window'), 'h2o', 8, NotImplementedError, 'no layer has a cache'),
    (('attention', 'mla'), 'tova', 8, NotImplementedError, 'MLA'),
    (('attention',), 'h20', 8, ConfigError, 'h2o'),
    (('attention',), 'h2o', 0, ConfigError, 'kv_budget=0'),
  ],
)
def test_refusals(model, policy, budget, error, message):
  model = model_of(*model, num_layers=len(model))
  with pytest.raises(error, match=message):
    evict(model, policy, budget)


def test_leaves_the_model_as_it_was():
  model = plain()
  before = jax.tree.structure(model)
  evict(model, 'h2o', 4)
  assert jax.tree.structure(model) == before


@pytest.mark.in_turn
def test_sample_script(monkeypatch, capsys):
  def run(pattern, *flags):
    flags = ('--temperature=0', *flags)
    _, *said = sample(monkeypatch, capsys, model_of(pattern), *flags)
    return said

  full = run('attention')[0].rpartition('\n\n')[0]
  large = run('attention', '--kv_policy=h2o', '--kv_budget=64')[0]
  assert full.startswith('ab') and large.rpartition('\n\n')[0] == full
  error = run('gla', '--kv_policy=h2o')[1]
  assert error.startswith('error: --kv_policy=h2o: ') and 'that grows' in error
