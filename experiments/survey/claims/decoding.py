"""Speculative decoding: whether it changes what is drawn, and what it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from flax import nnx

from efficient_attn import models
from efficient_attn.config import LMConfig
from efficient_attn.decode.generate import generate
from efficient_attn.decode.speculative import accept, speculate
from experiments import page
from experiments.survey.claim import (
  Claim,
  elsewhere,
  holds,
  listed,
  statement,
)
from experiments.survey.models import forward_flops
from experiments.survey.sources import OURS

VOCAB, AHEAD = 64, 4  # tokens drafted
PROMPT = (1, 2, 3, 4)
MIXED = (0.0, 0.25, 0.5, 0.75)  # how much of the target a draft has
ROWS, REPEATS = 4096, 4


def language_model(layers: int, width: int, seed: int) -> nnx.Module:
  """A language model of random weights."""
  config = LMConfig(
    d_model=width,
    num_layers=layers,
    num_heads=2,
    vocab_size=VOCAB,
    scan_layers=False,
  )
  return models.init(models.with_dtype(config), jax.random.key(seed))


class Mixture(nnx.Module):
  """A draft that is nearer to the target the more of it is mixed in."""

  position = None

  def __init__(self, target: nnx.Module, draft: nnx.Module, share: float):
    self.models = nnx.List([target, draft])
    self.shares = share, 1 - share

  def __call__(self, tokens, *, segment_ids=None, cache):
    """Returns the mean of the logits, and the next caches."""
    found = [
      model(tokens, segment_ids=segment_ids, cache=one)
      for model, one in zip(self.models, cache, strict=True)
    ]
    logits, caches = zip(*found, strict=True)
    mean = sum(s * x for s, x in zip(self.shares, logits, strict=True))
    return mean, list(caches)

  def init_cache(self, batch: int, max_len: int):
    """Returns the caches of both."""
    return [model.init_cache(batch, max_len) for model in self.models]


@jax.jit
def wrong(target, draft, prompt, key):
  """Draws two tokens [B, 2], those behind a rejected one from p.

  So that each token is the draft's if that is accepted, and else drawn from p.
  """
  tokens = prompt
  for each in jax.random.split(key):
    p, q = (jax.nn.softmax(m(tokens)[0][:, -1:]) for m in (target, draft))
    keys = jax.random.split(each, 3)
    new, other = (
      jax.random.categorical(k, jnp.log(x))
      for k, x in zip(keys[:2], (q, p), strict=True)
    )
    accepting = jax.random.split(keys[2], len(prompt))
    taken = jax.vmap(accept)(p, q, new, accepting)
    new = jnp.where(taken[:, None] == 1, new, other)
    tokens = jnp.concatenate([tokens, new], axis=1)
  return tokens[:, -2:]


def pairs(tokens) -> np.ndarray:
  """How often each pair of first tokens was drawn, [V V]."""
  first, second = np.asarray(tokens).T
  return np.bincount(VOCAB * first + second, minlength=VOCAB**2)


def expected(target) -> np.ndarray:
  """The target's probabilities of the same pairs."""
  prompts = jnp.broadcast_to(jnp.array(PROMPT), (VOCAB, len(PROMPT)))
  prompts = jnp.concatenate([prompts, jnp.arange(VOCAB)[:, None]], axis=1)
  p = np.asarray(jax.nn.softmax(target(prompts)[0].astype(jnp.float32)))
  joint = p[0, -2][:, None].astype(np.float64) * p[:, -1]
  return (joint / joint.sum()).ravel()


def compared(counts, p) -> dict:
  """Distance in total variation, and the p-value of a chi-squared test."""
  total = counts.sum()
  rare = p * total < 5  # one cell of all that are expected less often
  cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, p * total)]
  return dict(
    distance=float(np.abs(counts / total - p).sum() / 2),
    p=float(scipy.stats.chisquare(*cells).pvalue),
  )


def measure() -> dict:
  """R35: what is drawn, and how many tokens a block yields."""
  target, draft = language_model(2, 32, 0), language_model(1, 16, 1)
  p, start = expected(target), len(PROMPT)
  keys = jax.random.split(jax.random.key(0), REPEATS)
  prompt = jnp.broadcast_to(jnp.array(PROMPT), (ROWS, start))

  def continued(model, key):
    return generate(model, prompt, key, length=2)

  def speculated(key):
    return speculate(target, draft, prompt, key, length=2, ahead=AHEAD)[0]

  draws = {
    'target': functools.partial(continued, target),
    'draft': functools.partial(continued, draft),
    'speculative': speculated,
    'wrong': functools.partial(wrong, target, draft, prompt),
  }
  found = dict(samples=ROWS * REPEATS)
  for name, draw in draws.items():
    found[name] = compared(sum(pairs(draw(key)) for key in keys), p)
  found['cost'] = draft_cost(target, draft)
  found['blocks'] = [
    saving(target, draft, share, found['cost']) for share in MIXED
  ]
  return found


def draft_cost(target, draft, length=32) -> float:
  """FLOPs of a pass of the draft over those of the target."""
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  flops = [forward_flops(model, tokens) for model in (draft, target)]
  return flops[0] / flops[1]


def saving(target, draft, share: float, cost: float) -> dict:
  """Acceptance and tokens a block, counted, and tokens by the formula."""
  prompt = jnp.broadcast_to(jnp.array(PROMPT), (512, len(PROMPT)))
  _, counts = speculate(
    target,
    Mixture(target, draft, share),
    prompt,
    jax.random.key(1),
    length=6 * (AHEAD + 1),
    ahead=AHEAD,
  )
  blocks, accepted, rejected = (
    int(counts[name].sum()) for name in ('blocks', 'accepted', 'rejected')
  )
  rate = accepted / (accepted + rejected)
  tokens = accepted / blocks + 1
  return dict(
    share=share,
    accepted=rate,
    tokens=tokens,
    formula=(1 - rate ** (AHEAD + 1)) / (1 - rate),
    faster=tokens / (1 + AHEAD * cost),
  )


def _table(v) -> list:
  head = ['the target in the draft', 'accepted', 'tokens a block']
  head += ['formula', 'times faster']
  return [
    page.Table(head, [list(row.values()) for row in v['blocks']]),
    page.Text(
      f'{AHEAD} tokens drafted, at {v["cost"]:.2f} of the FLOPs of the target '
      'each, as if the target were no part of the draft; two '
      f'language models of random weights and {VOCAB} tokens.',
      note=True,
    ),
  ]


@statement(
  'Accepting x of the draft q with min(1, p(x) / q(x)), and drawing from '
  'max(0, p - q) otherwise, draws from the target p',
  f'{OURS}, on S003 Speculative Decoding',
  rule='chi-squared over pairs of tokens: p above 1e-3, where the draft and '
  'the wrong rule are below',
)
def speculation_keeps_the_distribution(v):
  form = 'distance {distance:.3f}, p = {p:.2g}'
  names = ('speculative', 'target', 'draft', 'wrong')
  speculative, target, draft, wrong = (form.format_map(v[n]) for n in names)
  text = (
    f'{speculative}; the target itself {target}; the draft {draft}; drawing '
    f'the last token from p {wrong}'
  )
  others = max(v['draft']['p'], v['wrong']['p'])
  return holds(v['speculative']['p'] > 1e-3 > others), text


@statement(
  'A block yields (1 - a^(g + 1)) / (1 - a) tokens',
  f'{OURS}, on S003 Speculative Decoding',
  rule='within 3 percent, a being the part of drafted tokens accepted',
)
def blocks_yield_the_formula(v):
  rows = v['blocks']
  near = (abs(row['tokens'] / row['formula'] - 1) < 0.03 for row in rows)
  text = listed('{0[tokens]:.2f} for {0[formula]:.2f}', rows)
  return holds(all(near)), text


@statement(
  'Speculative decoding is 2 to 3 times as fast',
  'S003 Speculative Decoding',
  '2-3x',
  rule='tokens of counted blocks over FLOPs in passes of the target; restated '
  'if that depends on how many are accepted',
)
def blocks_save_passes(v):
  rows = v['blocks']
  inside = [2 <= row['faster'] <= 3 for row in rows]
  form = '{0[faster]:.2f}x where {0[accepted]:.0%} are accepted'
  return holds(all(inside), restated=any(inside)), listed(form, rows)


R35 = Claim(
  title='Speculative decoding',
  tier='b',
  measure=measure,
  seeds=(0, 1),
  parts=_table,
  statements=(
    speculation_keeps_the_distribution,
    blocks_yield_the_formula,
    blocks_save_passes,
    elsewhere(
      'and that in seconds',
      'S003 Speculative Decoding',
      '2-3x',
      'a trained pair of models on an accelerator',
    ),
  ),
)

DECODING = {'R35': R35}
