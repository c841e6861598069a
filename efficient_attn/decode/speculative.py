"""Speculative decoding: a small model drafts, a large one reads what it drew.

A block is one pass of the target over `ahead` drafted tokens, of which it keeps
those that it would have drawn (Leviathan et al. 2211.17192, Chen et al.
2302.01318). With the draft's probabilities q and the target's p,

  token x of q is accepted with probability min(1, p(x) / q(x));
  the one behind the accepted is of max(0, p - q), or of p if all were,

so that the tokens have exactly the distribution of the target. Both models have
a cache, and rows accept different numbers of tokens: each row has a cursor of
its own, on one device.

What was read and not accepted is taken back, see `layers.cache.rewind`. Caches
that hold a state cannot do that: such a model reads the accepted tokens once
more, in pieces of 4, 2 and 1 if `ahead` is 4, which costs a target of that kind
most of what it saves. The draft reads `ahead` + 1 tokens a block.
"""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.decode.generate import check_length, check_lengths
from efficient_attn.decode.sampling import probabilities
from efficient_attn.layers.cache import can_rewind, rewind


@chex.dataclass(frozen=True)
class Counts:
  """The blocks of each row, int32 [B] each.

  Attributes:
    blocks: how many there were: passes of the target. A last block may have
      more tokens than were asked for.
    accepted: drafted tokens that the target accepted.
    rejected: blocks in which it did not accept all.
  """

  blocks: jax.Array
  accepted: jax.Array
  rejected: jax.Array


def speculate(
  target: nnx.Module,
  draft: nnx.Module,
  prompt: jax.Array,
  key: jax.Array,
  *,
  length: int,
  ahead: int = 4,
  prompt_lengths: Sequence[int] | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  allowed: jax.Array | None = None,
  stop: tuple[int, ...] = (),
) -> tuple[jax.Array, Counts]:
  """Continues each prompt by `length` tokens of the target.

  With a temperature of 0 they are those of `generate`, up to rounding; if a
  mixer depends on the room of its cache, that is of `ahead` tokens more.

  Args:
    target: a language model.
    draft: another one with the same tokens, which may be anything.
    prompt: int32 [B, P], P >= 1; see `generate.pad`.
    key: PRNG key.
    length: how many tokens to add.
    ahead: how many tokens the draft draws for a block.
    prompt_lengths: see `generate`, as are the others.
    temperature: of both models.
    top_k: of both.
    top_p: of both.
    allowed: bool [V].
    stop: tokens that end a row.

  Returns:
    int32 [B, length], and what was accepted.

  Raises:
    ConfigError: an option is out of range, the models have other vocabularies,
      or one has fewer learned positions than it reads, which may be `ahead`
      more than are asked for.
    NotImplementedError: prompts of unequal length, but a mixer cannot begin
      with padding.
  """
  size = prompt.shape[1]
  if ahead < 1:
    raise ConfigError(f'ahead={ahead} must be at least 1')
  check_length(target, size, length)
  for model in (target, draft):
    check_length(model, size, length + ahead)
  lengths = check_lengths(prompt, prompt_lengths)
  ids = None
  if (lengths < size).any():
    blocks = [*target.stack.blocks(), *draft.stack.blocks()]
    names = [b.name for b in blocks if not b.mixer.left_padding]
    if names:
      raise NotImplementedError(
        f'prompt_lengths={lengths.tolist()} but {names[0]} cannot begin with '
        'padding; continue prompts of one length at a time'
      )
    ids = (jnp.arange(size) >= size - lengths[:, None]).astype(jnp.int32)
  return _speculate(
    target,
    draft,
    prompt,
    ids,
    key,
    allowed,
    length=length,
    ahead=ahead,
    stop=stop,
    draw=(temperature, top_k, top_p),
  )


@functools.partial(jax.jit, static_argnames=('length', 'ahead', 'stop', 'draw'))
def _speculate(
  target, draft, prompt, ids, key, allowed, *, length, ahead, stop, draw
):
  """Fills rows [P + length + ahead], block by block."""
  batch, size = prompt.shape
  total = size + length
  ending = jnp.asarray(stop, jnp.int32)
  temperature, top_k, top_p = draw

  def weigh(logits):
    """The probabilities of logits [T, V], of tokens that are allowed."""
    if allowed is not None:
      logits = jnp.where(allowed, logits[:, : len(allowed)], -jnp.inf)
    return probabilities(
      logits, temperature=temperature, top_k=top_k, top_p=top_p
    )

  def begin(model):
    """A cache for each row, which has read all but the last of a prompt."""

    def one(tokens, ids):
      cache = model.init_cache(1, total + ahead - 1)
      if size == 1:
        return cache
      ids = None if ids is None else ids[None, :-1]
      return model(tokens[None, :-1], segment_ids=ids, cache=cache)[1]

    return jax.vmap(one)(prompt, ids)

  def block(tokens, end, caches, key):
    """One block of one row, of which `end` tokens are there.

    Returns the row, how many drafted tokens it accepted, and for any number of
    tokens that stay the caches after them.
    """
    *keys, accepting, last = jax.random.split(key, ahead + 3)

    def draw_one(carry, key):
      token, cache = carry
      logits, cache = draft(token[None, None], cache=cache)
      q = weigh(logits[0])[0]
      new = jax.random.categorical(key, jnp.log(q)).astype(jnp.int32)
      return (new, cache), (new, q)

    # The token after the last drafted is not used: its step reads that one.
    (_, drafts), (drawn, q) = jax.lax.scan(
      draw_one, (tokens[end - 1], caches[1]), jnp.stack(keys)
    )
    drawn, q = drawn[:-1], q[:-1]
    read = jnp.append(tokens[end - 1], drawn)
    logits, targets = target(read[None], cache=caches[0])
    p = weigh(logits[0])
    if p.shape[-1] != q.shape[-1]:
      raise ConfigError(
        f'the draft has {q.shape[-1]} tokens and the target {p.shape[-1]}; '
        'take a draft of the same tokenizer'
      )
    taken = accept(p[:-1], q, drawn, accepting)
    rest = residual(p, q, taken)
    new = jax.random.categorical(last, jnp.log(rest)).astype(jnp.int32)
    at = jnp.arange(ahead + 1)
    written = jnp.where(at < taken, jnp.append(drawn, 0), new)
    tokens = tokens.at[end + at].set(written)
    ended = (jnp.isin(written, ending) & (at <= taken)).any()
    return tokens, taken, ended, read, (targets, drafts)

  def step(state):
    tokens, end, active, caches, key, counts = state
    key, now = jax.random.split(key)
    tokens, taken, ended, read, after = jax.vmap(block)(
      tokens, end, caches, jax.random.split(now, batch)
    )
    stay = jnp.where(active, taken + 1, 0)
    caches = [
      jax.vmap(functools.partial(take_back, model))(*each, read, stay)
      for model, *each in zip((target, draft), caches, after, strict=True)
    ]
    found = Counts(blocks=1, accepted=taken, rejected=taken < ahead)
    counts = jax.tree.map(lambda x, y: x + active * y, counts, found)
    end = end + stay
    return tokens, end, active & (end < total) & ~ended, caches, key, counts

  zeros = jnp.zeros(batch, jnp.int32)
  tokens, _, _, _, _, counts = jax.lax.while_loop(
    lambda state: state[2].any(),
    step,
    (
      jnp.pad(prompt, ((0, 0), (0, length + ahead))),
      zeros + size,
      zeros == 0,
      [begin(target), begin(draft)],
      key,
      Counts(blocks=zeros, accepted=zeros, rejected=zeros),
    ),
  )
  tokens = tokens[:, size:total]
  if stop:  # which is repeated behind itself
    at = jnp.arange(length)
    first = jnp.where(jnp.isin(tokens, ending), at, length - 1).min(1)
    last = jnp.take_along_axis(tokens, first[:, None], axis=1)
    tokens = jnp.where(at <= first[:, None], tokens, last)
  return tokens, counts


def accept(p, q, drawn, key) -> jax.Array:
  """Returns how many drafted tokens are accepted, up to the first that is not.

  Args:
    p: [T, V], the target's probabilities of each token.
    q: [T, V], those of the draft.
    drawn: int32 [T], drawn from q.
    key: PRNG key.
  """
  p, q = (jnp.take_along_axis(x, drawn[:, None], 1)[:, 0] for x in (p, q))
  draws = jax.random.uniform(key, drawn.shape)
  return jnp.cumprod(draws * q < p).sum().astype(jnp.int32)


def residual(p, q, taken) -> jax.Array:
  """Returns what the token behind `taken` ones is drawn from, unnormalised.

  Args:
    p: [T + 1, V], the target's probabilities.
    q: [T, V], those of the draft.
    taken: [], how many drafted tokens were accepted.
  """
  rest = jnp.maximum(p - jnp.pad(q, ((0, 1), (0, 0))), 0)[taken]
  # Rounding may leave nothing where p is nearly q.
  return jnp.where(rest.sum() > 0, rest, p[taken])


def take_back(model, before, after, read, count):
  """Returns the cache of a row after `count` of the tokens read [T]."""
  if can_rewind(before, len(read)):
    return rewind(before, after, len(read), count)
  cache, at = before, jnp.zeros((), jnp.int32)
  for power in reversed(range(len(read).bit_length())):
    piece = 2**power
    new = jax.lax.dynamic_slice_in_dim(read, at, piece)
    fits = at + piece <= count
    _, longer = model(new[None], cache=cache)
    cache = jax.tree.map(functools.partial(jnp.where, fits), longer, cache)
    at = at + piece * fits
  return cache
