"""Generation equals decoding without a cache; sampling keeps its promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.decode.generate import generate, pad
from efficient_attn.decode.rows import apart, insert, step
from efficient_attn.decode.sampling import sample
from efficient_attn.layers.mixers import MIXERS

KEY = jax.random.key(0)
PROMPT = jax.random.randint(jax.random.key(3), (2, 5), 0, 32)


def model_of(*pattern, **options):
  config = LMConfig(
    d_model=16,
    num_heads=2,
    num_layers=2,
    vocab_size=32,
    pattern=pattern,
    **options,
  )
  return models.init(config, jax.random.key(0))


# One row for each kind of cache; that every row's cache continues a sequence
# is tested with the mixers.
CACHES = (
  'attention',
  'window',
  'path',
  'linear',
  'gla',
  'mamba',
  'log_linear',
  'ttt_linear',
)


@pytest.mark.parametrize(
  'mixer, lengths',
  [
    *((name, (5, 5)) for name in CACHES),
    *((name, (5, 3)) for name in CACHES),
    *(
      pytest.param(name, (5, 3), marks=pytest.mark.exhaustive)
      for name, spec in MIXERS.items()
      if spec.causal and name not in CACHES
    ),
  ],
)
def test_greedy_equals_uncached(mixer, lengths):
  """Each prompt of a batch goes on as it would alone, without a cache."""
  model = model_of(mixer)
  length, size = 12, PROMPT.shape[1]
  prompts = [row[:n] for row, n in zip(PROMPT, lengths, strict=True)]
  rows, given = pad(prompts)
  ragged = None if min(lengths) == size else given
  found = generate(
    model,
    rows,
    jax.random.key(0),
    length=length,
    prompt_lengths=ragged,
    temperature=0,
  )
  # One compilation serves every step: what follows a token cannot change it.
  # As many tokens as the cache has room for, which some mixers ask for.
  forward = jax.jit(lambda tokens: model(tokens)[0])
  tokens = np.zeros((2, size + length - 1), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[: len(prompt)] = prompt
  continued = np.zeros((2, length), np.int32)
  for t in range(length):
    logits = np.asarray(forward(tokens))
    for b, n in enumerate(lengths):
      continued[b, t] = logits[b, n + t - 1].argmax()
      if n + t < tokens.shape[1]:
        tokens[b, n + t] = continued[b, t]
  np.testing.assert_array_equal(found, continued)


@pytest.mark.parametrize('lengths', [None, (5, 3)])
def test_a_row_ends_at_a_stop_token(lengths):
  model, options = model_of('gla'), dict(length=12, temperature=0)
  options['prompt_lengths'] = lengths
  whole = np.asarray(generate(model, PROMPT, jax.random.key(0), **options))
  stop = int(whole[0, 4])
  found = generate(model, PROMPT, jax.random.key(0), stop=(stop,), **options)
  for row, cut in zip(whole, np.asarray(found), strict=True):
    first = np.flatnonzero(row == stop)
    end = first[0] + 1 if len(first) else len(row)
    np.testing.assert_array_equal(cut[:end], row[:end])
    assert (cut[end:] == stop).all()


@pytest.mark.parametrize('lengths', [(5,), (5, 0), (6, 1)])
def test_lengths_that_prompts_cannot_have(lengths):
  with pytest.raises(ConfigError, match='one number from 1 to 5 for each of 2'):
    generate(
      model_of('gla'),
      PROMPT,
      jax.random.key(0),
      length=1,
      prompt_lengths=lengths,
    )


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'pattern', [('attention',), ('window', 'gla'), ('moba',), ('ttt_linear',)]
)
@pytest.mark.parametrize('scan', [False, True])
def test_a_row_starts_again_while_others_go_on(pattern, scan):
  options = dict(scan_layers=True, pattern=pattern * 2) if scan else {}
  model = model_of(*options.pop('pattern', pattern), **options)
  room, new = 16, jnp.array([[7, 1, 9]])

  @jax.jit
  def alone(prompt):
    return generate(model, prompt, KEY, length=8, temperature=0)

  cache = model.init_cache(2, room)
  logits, cache = jax.jit(lambda x, c: model(x, cache=c))(PROMPT, cache)
  token, rows, found = logits[:, -1].argmax(-1), None, []
  read = jax.jit(lambda tokens, rows: step(model, tokens, rows))
  for i in range(8):
    if i == 3:  # another prompt takes the place of the first
      logits, fresh = jax.jit(lambda x, c: model(x, cache=c))(
        new, model.init_cache(1, room)
      )
      rows = insert(rows, 0, fresh)
      token = token.at[0].set(logits[0, -1].argmax(-1))
    found.append(token)
    rows = apart(model, cache, 2) if rows is None else rows
    logits, rows = read(token, rows)
    token = logits.argmax(-1)
  found = jnp.stack(found, axis=1)
  first = alone(PROMPT)
  np.testing.assert_array_equal(found[1], first[1])
  np.testing.assert_array_equal(found[0, :3], first[0, :3])
  np.testing.assert_array_equal(found[0, 3:], alone(new)[0, :5])


@pytest.mark.in_turn
def test_sampled_equals_uncached():
  model = model_of('gla', 'attention')
  key, length = jax.random.key(5), 12
  found = generate(model, PROMPT, key, length=length, temperature=0.9, top_k=9)
  tokens = jnp.pad(PROMPT, ((0, 0), (0, length)))
  forward = jax.jit(lambda tokens: model(tokens)[0])
  for t, step_key in enumerate(jax.random.split(key, length), PROMPT.shape[1]):
    logits = forward(tokens)[:, t - 1]
    new = sample(logits, step_key, temperature=0.9, top_k=9)
    tokens = tokens.at[:, t].set(new)
  np.testing.assert_array_equal(found, tokens[:, PROMPT.shape[1] :])


def test_length_one():
  model = model_of('gla')
  assert generate(model, PROMPT, jax.random.key(0), length=1).shape == (2, 1)


def test_learned_positions_are_not_repeated():
  model = model_of('attention', position='learned', max_len=8)
  key = jax.random.key(0)
  fits = dict(temperature=0, length=4)  # the last token is not read
  assert generate(model, PROMPT, key, **fits).shape == (2, 4)
  for prompt, length in ((PROMPT, 5), (jnp.tile(PROMPT, (1, 2)), 1)):
    with pytest.raises(ValueError, match=r'learned positions.*max_len=8'):
      generate(model, prompt, key, length=length)


@pytest.mark.parametrize(
  'mixer,options',
  [
    ('sinkhorn', dict(block_size=2, max_blocks=4)),
    ('synthesizer', dict(max_len=8)),
    ('cosformer', dict(max_length=8)),
  ],
)
def test_a_mixer_refuses_more_than_its_table(mixer, options):
  model = model_of(mixer, mixers={mixer: options})
  with pytest.raises(ConfigError, match=f'{mixer}: .*{list(options)[-1]}'):
    generate(model, PROMPT, jax.random.key(0), length=5)


@pytest.mark.parametrize('temperature', [0, 5.0])
def test_only_allowed_tokens_are_drawn(temperature):
  allowed = np.zeros(20, bool)
  allowed[[3, 4, 17]] = True
  found = generate(
    model_of('gla'),
    PROMPT,
    jax.random.key(0),
    length=40,
    temperature=temperature,
    top_k=5,
    allowed=allowed,
  )
  assert set(np.ravel(found)) <= {3, 4, 17}


@pytest.mark.parametrize(
  'options',
  [
    dict(length=0),
    dict(length=2, temperature=-1.0),
    dict(length=2, temperature=float('nan')),
    dict(length=2, top_k=33),
    dict(length=2, top_k=-2),
    dict(length=2, top_p=0.0),
    dict(length=2, top_p=1.1),
  ],
  ids=str,
)
def test_options_out_of_range(options):
  name, value = list(options.items())[-1]
  with pytest.raises(ConfigError, match=f'{name}={value}'):
    generate(model_of('gla'), PROMPT, jax.random.key(0), **options)


LOGITS = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))


def draws(**options):
  keys = jax.random.split(jax.random.key(0), 4000)
  found = jax.vmap(lambda k: sample(LOGITS[None], k, **options)[0])(keys)
  return np.bincount(found, minlength=4) / len(keys)


@pytest.mark.parametrize(
  'options,wanted',
  [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), np.square([0.1, 0.4, 0.2, 0.3]) / 0.30),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_k=1), [0, 1, 0, 0]),
    (dict(top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(top_p=1e-6), [0, 1, 0, 0]),
    (dict(top_k=3, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
    (dict(temperature=0), [0, 1, 0, 0]),
    (dict(temperature=1e-40), [0, 1, 0, 0]),
    (dict(temperature=1e-37, top_k=3), [0, 1, 0, 0]),
    (dict(top_k=-1), [0.1, 0.4, 0.2, 0.3]),
  ],
  ids=str,
)
def test_sample_frequencies(options, wanted):
  np.testing.assert_allclose(draws(**options), wanted, atol=0.03)
