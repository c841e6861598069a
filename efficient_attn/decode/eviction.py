"""KV eviction: caches that hold `budget` tokens, and who decides which.

Each step attends to what is held and to the new tokens, scores all of them,
keeps the best `budget` and gathers them:

  H2O        score_j += sum_t p_tj over the new queries t; half of the budget
             goes to the last tokens (Zhang et al. 2306.14048)
  SnapKV     score_j = mean of p_tj over the last 32 queries t, averaged over 5
             neighbours j; the last tokens stay (Li et al. 2404.14469)
  TOVA       score_j = p_tj of the last query t, averaged over the heads (Oren
             et al. 2401.06104)
  StreamingLLM  the first 4 tokens and the last (Xiao et al. 2309.17453)

A prompt is attended to whole and then cut, so its outputs are exact. Keys keep
the rotation of their own position, and new tokens count on from the true
length; StreamingLLM's paper counts positions inside the cache instead, and
SnapKV's cuts the prompt once and lets the cache grow from there. One device:
nothing here is sharded.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import Cursor
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.layers.mixers.softmax.attention import Attention
from efficient_attn.ops import masks, scores

Tokens = dict[str, jax.Array]  # each [B, S, K] or [B, S, K, H]


@dataclasses.dataclass(frozen=True)
class Policy:
  """A row of `POLICIES`.

  Attributes:
    observed: how many of the last queries are asked what they attend to; None
      for the new ones.
    score: from what is held and what each token received, [B, S, K], to the
      scores that decide.
    always: from positions, their end and the budget to what is kept anyway.
  """

  observed: int | None
  score: Callable[[Tokens, jax.Array], jax.Array]
  always: Callable[[jax.Array, jax.Array, int], jax.Array]


def _recent(position, length, budget):
  """The last 32 tokens, or half of the budget if that is less."""
  return position >= length - min(32, budget // 2)


def _smooth(received):
  """The mean of five neighbours, of zeros past the ends."""
  ones = (1, 5, 1), (1, 1, 1), 'SAME'
  return lax.reduce_window(received, 0.0, lax.add, *ones) / 5


def _over_heads(received):
  mean = received.mean(2, keepdims=True)
  return jnp.broadcast_to(mean, received.shape)


POLICIES = {
  'h2o': Policy(
    None,
    lambda held, received: held['score'] + received,
    lambda position, length, budget: position >= length - budget // 2,
  ),
  'snapkv': Policy(32, lambda held, received: _smooth(received), _recent),
  'tova': Policy(
    1,
    lambda held, received: _over_heads(received),
    lambda position, length, budget: False,
  ),
  'streaming_llm': Policy(
    0,
    lambda held, received: held['position'].astype(jnp.float32),
    lambda position, length, budget: position < min(4, budget // 2),
  ),
}


# The exponents of caches that stay small, see `MixerSpec.state`.
KEPT = (0, 'log')


@masks.expression
class Held(masks.Mask):
  """Admits what each head holds (no position is -1) and is not ahead."""

  query_positions: jax.Array  # [#B, T]
  key_positions: jax.Array  # [B, N, S]
  rule: masks.Mask | None = None
  axes = {'query_positions': 'BT', 'key_positions': 'BNS'}

  def tile(self, rows, cols):
    """The mask of one tile."""
    query = lax.dynamic_slice_in_dim(
      self.query_positions, rows[0], rows.size, axis=1
    )[:, None, :, None]
    key = lax.dynamic_slice_in_dim(
      self.key_positions, cols[0], cols.size, axis=2
    )[:, :, None]
    seen = (key >= 0) & (key <= query)
    return seen if self.rule is None else seen & self.rule.pairs(query, key)


@chex.dataclass(frozen=True)
class EvictingCache:
  """The tokens that were kept so far.

  Attributes:
    held: key, value, position and score of what each kv head holds, each
      [B, M, K, ...]; position -1 is nothing.
    query: [B, past, N, H], the last queries.
    cursor: how many tokens there were.
  """

  held: Tokens
  query: jax.Array
  cursor: Cursor


class Evicting(Mixer):
  """A layer of attention with a cache of at most `budget` tokens."""

  def __init__(self, mixer: Attention, policy: str, budget: int):
    self.mixer = mixer
    self.policy = policy
    self.budget = budget

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    if cache is None:
      return self.mixer.mix_tokens(x, context, cache)
    query, key, value = self.mixer.project(x, context, cache.cursor)
    B, T, N, _ = query.shape
    cursor = cache.cursor.advance(T, context)
    start = 0 if cursor.start is None else cursor.start[:, None]
    # Padding in front has negative positions.
    rows = cache.cursor.length + jnp.arange(T)[None] - start
    at = jnp.broadcast_to(
      jnp.maximum(rows, -1)[:, :, None], (B, T, key.shape[2])
    )
    score = jnp.zeros(at.shape, jnp.float32)
    new = dict(key=key, value=value, position=at, score=score)
    held = {
      name: jnp.concatenate([y, new[name].astype(y.dtype)], axis=1)
      for name, y in cache.held.items()
    }
    seen = self.mask(rows, held, N), self.bias(rows, held, N)
    mixer = self.mixer
    o = mixer.weights(query, held['key'], held['value'], *seen, mixer.scale)
    out = mixer.output(o, x)

    policy, past = POLICIES[self.policy], cache.query.shape[1]
    query = query.astype(cache.query.dtype)
    query = jnp.concatenate([cache.query, query], axis=1)
    rows = rows[:, :1] + jnp.arange(-past, T)
    asked = past + T if policy.observed is None else policy.observed
    received = 0
    if asked:
      received = self.received(query[:, -asked:], rows[:, -asked:], held)
    held['score'] = policy.score(held, received)
    length = rows[:, -1:, None] + 1
    always = policy.always(held['position'], length, self.budget)
    kept = keep(held, always, cache.held['key'].shape[1])
    return out, EvictingCache(held=kept, query=query[:, T:], cursor=cursor)

  def mask(self, rows, held, num_heads):
    """What queries at positions `rows` see."""
    at = held['position'].swapaxes(1, 2)
    at = jnp.repeat(at, num_heads // at.shape[1], axis=1)
    return Held(rows, at, self.mixer.mask_rule.mask(at.shape[2]))

  def bias(self, rows, held, num_heads):
    """The biases of positions, which are not places in the cache, or None."""
    at = held['position'].swapaxes(1, 2)  # [B, K, S]
    distance = jnp.repeat(at, num_heads // at.shape[1], axis=1)[:, :, None]
    distance = distance - rows[:, None, :, None]
    whole = self.mixer.bias(0)
    if isinstance(whole, scores.Alibi):
      found = -jnp.asarray(whole.slopes)[:, None, None] * jnp.abs(distance)
    elif isinstance(whole, scores.T5):  # [B, N, T, heads, S], of which its own
      found = jnp.einsum('bntns->bnts', whole.by_distance(distance))
    else:
      return None
    return scores.Dense(found)

  def received(self, query, rows, held):
    """sum_t p_tj over queries and the heads of a group, [B, S, K].

    P^T 1 is the gradient of attention to its values, so that no T x S matrix
    need exist.
    """
    query, key = (x.astype(jnp.float32) for x in (query, held['key']))
    heads, mixer = query.shape[2], self.mixer
    seen = self.mask(rows, held, heads), self.bias(rows, held, heads)

    def average(value):
      return mixer.weights.average(query, key, value, *seen, mixer.scale)

    ones = jnp.zeros((*key.shape[:3], 1), jnp.float32)
    out, pull = jax.vjp(average, ones)
    return pull(jnp.ones_like(out))[0][..., 0]

  def init_cache(self, batch: int, max_len: int, dtype) -> EvictingCache:
    """Returns room for the budget, or for `max_len` if that is less."""
    empty = self.mixer.init_cache(batch, min(self.budget, max_len), dtype)
    heads = empty.buffers['key'].shape[:3]
    past = max((POLICIES[self.policy].observed or 0) - 1, 0)
    held = empty.buffers | dict(
      position=jnp.full(heads, -1, jnp.int32),
      score=jnp.zeros(heads, jnp.float32),
    )
    shape = batch, past, self.mixer.num_heads, self.mixer.kv_heads[1]
    return EvictingCache(
      held=held, query=jnp.zeros(shape, dtype), cursor=empty.cursor
    )


def keep(held: Tokens, always: jax.Array, count: int) -> Tokens:
  """The best `count` tokens of each kv head, in their order."""
  score = jnp.where(always, jnp.inf, held['score'])
  score = jnp.where(held['position'] >= 0, score, -jnp.inf)
  _, index = lax.top_k(score.swapaxes(1, 2), count)
  index = jnp.sort(index, axis=-1).swapaxes(1, 2)

  def gather(x):
    at = index.reshape(index.shape + (1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, at, axis=1)

  return jax.tree.map(gather, held)


def evict(model: nnx.Module, policy: str, budget: int) -> nnx.Module:
  """Returns `model`, a language model, with caches of `budget` tokens.

  Layers whose caches do not grow with the length keep them.

  Raises:
    NotImplementedError: no cache grows, or one is not of keys and values.
  """
  choose('kv_policy', policy, POLICIES)
  if budget < 1:
    raise ConfigError(f'kv_budget={budget} must be at least 1')
  model = nnx.merge(*nnx.split(model))  # the caller's stays as it is
  grows = [b for b in model.stack.blocks() if MIXERS[b.row].state not in KEPT]
  if not grows:
    raise NotImplementedError(
      'a kv policy has nothing to evict: no layer has a cache that grows'
    )
  for block in grows:
    _check(block.mixer)
    block.mixer = Evicting(block.mixer, policy, budget)
  return model


def _check(mixer):
  """Refuses what scores or keeps its keys in a way of its own."""
  plain = (
    isinstance(mixer, Attention)
    and mixer.shares_keys
    and not mixer.shared_kv
    and type(mixer).bias is Attention.bias
  )
  if not plain:
    raise NotImplementedError(
      f'a kv policy cannot evict from {type(mixer).__name__}: every layer must'
      ' be attention with keys of its own'
    )
