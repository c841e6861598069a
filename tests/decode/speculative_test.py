"""Speculative decoding draws what the target alone would draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.decode.generate import generate, pad
from efficient_attn.decode.sampling import probabilities, sample
from efficient_attn.decode.speculative import accept, residual, speculate
from efficient_attn.layers.mixers import MIXERS

KEY = jax.random.key(0)
PROMPT = jax.random.randint(jax.random.key(3), (2, 5), 0, 32)
SIZES = dict(d_model=16, num_heads=2, num_layers=2, vocab_size=32)


def model_of(*pattern, seed=0, **options):
  options = dict(pattern=pattern, tie_embeddings=False) | options
  config = LMConfig(**SIZES | options)
  return models.init(models.with_dtype(config), jax.random.key(seed))


def near(model):
  """A draft of other parameters that often draws the same."""
  rng = np.random.default_rng(0)

  def other(p):
    noise = rng.standard_normal(p.shape)
    return p + 0.3 * jnp.std(p) * noise.astype(np.float32)

  return jax.tree.map(other, model)


# Caches of tokens, of a window and of states, and one of each.
PATTERNS = (
  ('attention',),
  ('window',),
  ('path',),
  ('log_linear',),
  ('gla', 'attention'),
)


@pytest.mark.parametrize(
  'pattern',
  [
    *PATTERNS,
    *(
      pytest.param((name,), marks=pytest.mark.exhaustive)
      for name, spec in MIXERS.items()
      if spec.causal and (name,) not in PATTERNS
    ),
  ],
)
def test_greedy_equals_generate(pattern):
  # What the weights of cosformer are in terms of, by default the cache's room.
  mixers = {'cosformer': {'max_length': 32}}
  target = model_of(*pattern, mixers=mixers)
  draft = near(target)
  options = dict(length=12, temperature=0)
  wanted = generate(target, PROMPT, KEY, **options)
  found, counts = speculate(target, draft, PROMPT, KEY, ahead=3, **options)
  np.testing.assert_array_equal(found, wanted)
  assert counts.rejected.any() and counts.accepted.any()


@pytest.mark.in_turn
def test_a_target_accepts_its_own_drafts():
  target = model_of('gla', 'attention')
  options = dict(length=12, temperature=0)
  wanted = generate(target, PROMPT, KEY, **options)
  found, counts = speculate(target, target, PROMPT, KEY, ahead=3, **options)
  np.testing.assert_array_equal(found, wanted)
  for name, count in dict(blocks=3, accepted=9, rejected=0).items():
    assert (counts[name] == count).all()


@pytest.mark.in_turn
def test_rows_of_unequal_length_end_apart():
  target = model_of('attention', 'window', num_layers=5)
  draft = model_of('gla', seed=1)
  prompts, lengths = pad([[3, 1, 4, 1, 5], [9], [2, 6]])
  options = dict(length=10, prompt_lengths=lengths, temperature=0)
  wanted = generate(target, prompts, KEY, **options)
  found, _ = speculate(target, draft, prompts, KEY, **options)
  np.testing.assert_array_equal(found, wanted)
  stop = (int(wanted[0, 3]), int(wanted[1, 7]))
  wanted = generate(target, prompts, KEY, stop=stop, **options)
  found, _ = speculate(target, draft, prompts, KEY, stop=stop, **options)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.in_turn
def test_a_prompt_of_one_token():
  target, draft = model_of('gla'), model_of('attention', seed=1)
  options = dict(length=4, temperature=0)
  wanted = generate(target, PROMPT[:, :1], KEY, **options)
  found, _ = speculate(target, draft, PROMPT[:, :1], KEY, **options)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'options',
  [
    {},
    dict(temperature=1.5, top_k=5),
    dict(temperature=2.0, top_p=0.8, allowed=np.arange(8) % 3 > 0),
  ],
  ids=str,
)
def test_draws_are_distributed_as_the_target(options):
  """Chi-squared over pairs of tokens, which the draft's do not pass."""
  V, rows, small = 8, 4096, dict(vocab_size=8, num_layers=1, d_model=8)
  target, draft = (model_of('attention', seed=seed, **small) for seed in (0, 1))
  prompt = jnp.array([[1, 2, 3]])
  firsts = jnp.append(jnp.tile(prompt, (V, 1)), jnp.arange(V)[:, None], 1)
  allowed = options.get('allowed', np.ones(V, bool))
  draw = {k: v for k, v in options.items() if k != 'allowed'}

  def fits(model):
    """The p-value of what was drawn, if by this model."""
    logits = jnp.where(allowed, model(firsts)[0], -jnp.inf)
    p = np.asarray(probabilities(logits, **draw), np.float64)
    wanted = (p[0, -2][:, None] * p[:, -1]).ravel()
    wanted *= rows / wanted.sum()
    rare = wanted < 5  # one cell of all that are expected less often
    cells = [np.append(x[~rare], x[rare].sum()) for x in (drawn, wanted)]
    cells[1] += 1e-9  # so that what cannot be drawn may not be drawn
    return scipy.stats.chisquare(*cells, sum_check=False).pvalue

  found, _ = speculate(
    target,
    draft,
    jnp.tile(prompt, (rows, 1)),
    jax.random.key(5),
    length=2,
    ahead=2,
    **options,
  )
  first, second = np.asarray(found).T
  drawn = np.bincount(V * first + second, minlength=V * V)
  assert fits(target) > 1e-3 > fits(draft)


def test_the_rule_gives_back_the_target_exactly():
  """sum_x q(x) min(1, p / q) and the residual's share make p."""
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.ones(5), 2).astype(np.float32)
  rest = np.asarray(residual(np.stack([p, p]), q[None], 0))
  rest = rest / rest.sum()
  kept = np.minimum(p, q)
  np.testing.assert_allclose(kept + (1 - kept.sum()) * rest, p, atol=1e-6)
  np.testing.assert_allclose(residual(np.stack([p, p]), q[None], 1), p)
  np.testing.assert_allclose(residual(np.stack([p, p]), p[None], 0), p)

  def taken(key):
    return accept(jnp.tile(p, (2, 1)), jnp.tile(q, (2, 1)), drawn, key)

  drawn = jnp.array([int(np.argmax(q / p)), int(np.argmin(q / p))])
  rate = float((p / q).min())
  keys = jax.random.split(KEY, 4000)
  shares = np.bincount(jax.vmap(taken)(keys), minlength=3) / 4000
  np.testing.assert_allclose(shares, [1 - rate, 0, rate], atol=0.03)


@pytest.mark.parametrize(
  'options',
  [
    {},
    dict(temperature=0.7, top_k=3),
    dict(temperature=3.0, top_p=0.7),
    dict(temperature=0.0),
  ],
  ids=str,
)
def test_probabilities_are_those_of_sample(options):
  logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))
  keys = jax.random.split(KEY, 4000)
  draws = jax.vmap(lambda k: sample(logits[None], k, **options)[0])(keys)
  shares = np.bincount(draws, minlength=4) / len(keys)
  found = probabilities(logits, **options)
  np.testing.assert_allclose(found, shares, atol=0.03)
  assert found.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
  'options, said',
  [
    (dict(ahead=0), 'ahead=0'),
    (dict(length=0), 'length=0'),
    (dict(temperature=-1.0), 'temperature=-1.0'),
    (dict(top_k=33), 'top_k=33'),
    (dict(prompt_lengths=(5, 6)), 'prompt_lengths='),
  ],
  ids=str,
)
def test_options_out_of_range(options, said):
  model = model_of('attention')
  with pytest.raises(ConfigError, match=said):
    speculate(model, model, PROMPT, KEY, **dict(length=2) | options)


def test_models_that_do_not_fit():
  model = model_of('attention')
  other = model_of('attention', vocab_size=40)
  with pytest.raises(ConfigError, match='40 tokens and the target 32'):
    speculate(model, other, PROMPT, KEY, length=2)
  short = model_of('attention', position='learned', max_len=9)
  with pytest.raises(ConfigError, match='learned positions.*max_len=9'):
    speculate(model, short, PROMPT, KEY, length=2, ahead=4)
  blocks = model_of('moba')
  with pytest.raises(NotImplementedError, match='moba .*one length'):
    speculate(blocks, model, PROMPT, KEY, length=2, prompt_lengths=(5, 2))
