"""Scores from a few channels, axes or bits: the keys that they find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_attn.ops.routed.hash_attention import hash_attention, signs
from efficient_attn.ops.selection import scoring
from efficient_attn.ops.selection.tokens import select_loki, select_sparq

H, S, T = 128, 1024, 128
TOP = S // 8  # 12.5 percent of the keys
RANKS = (8, 16, 32, 64, 80, 96, 128)
BITS = (32, 64, 128, 256)
KINDS = ('independent', 'falling spectrum')
LEARNED = 'learned bits 32'


def scales(kind: str) -> jax.Array:
  """The deviation of each channel: all equal, or falling as c^-0.5."""
  found = np.ones(H)
  if kind == KINDS[1]:
    found = np.arange(1, H + 1) ** -0.5
  return jnp.asarray(found * (H / (found**2).sum()) ** 0.5, jnp.float32)


def heads(kind: str, seed: int, queries: int = T, keys: int = S) -> tuple:
  """Queries, the last of as many positions as there are keys, and keys."""
  pair = jax.random.split(jax.random.key(seed))
  return tuple(
    scales(kind) * jax.random.normal(key, (1, n, 1, H))
    for key, n in zip(pair, (queries, keys), strict=True)
  )


@functools.cache
def learned(steps: int = 100) -> tuple:
  """Projections to 32 bits, trained with the loss of HashAttention."""
  start = jax.random.normal(jax.random.key(0), (H, 32)) / H**0.5
  optimizer = optax.adam(0.03)

  def loss(weights, seed):
    q, k = heads(KINDS[1], seed, 64, 256)
    bits = (signs(x @ w) for x, w in zip((q, k), weights, strict=True))
    # Every query stands behind all of the keys.
    return hash_attention(q, k, k, *bits, top_k=256, offset=255)[1].mean()

  @jax.jit
  def train(weights):
    def step(carry, seed):
      weights, state = carry
      updates, state = optimizer.update(jax.grad(loss)(weights, seed), state)
      return (optax.apply_updates(weights, updates), state), None

    seeds = 1000 + jnp.arange(steps)  # of other heads than are measured
    carry = weights, optimizer.init(weights)
    return jax.lax.scan(step, carry, seeds)[0][0]

  return train((start, start))


def by_bits(q, k, weights):
  """The TOP keys whose bits agree best with those of the query."""
  agree = jnp.einsum(
    'btnl,bsnl->bnts',
    *(signs(x @ w) for x, w in zip((q, k), weights, strict=True)),
  )
  seen = scoring.causal(q, k).dense(T, S)
  return scoring.top(jnp.where(seen, agree, -jnp.inf), TOP)


def figures(kind: str, seed: int) -> dict[str, list[float]]:
  """Recall of the TOP keys, and their mass as a share of the best mass."""
  q, k = heads(kind, seed)
  seen = scoring.causal(q, k).dense(T, S)
  best = scoring.top(jnp.where(seen, scoring.logits(q, k), -jnp.inf), TOP)
  p = scoring.probabilities(q, k)
  chosen = {}
  for rank in RANKS:
    options = dict(rank=rank, top_k=TOP)
    sparq = select_sparq(q, k, local=0, **options)
    chosen[f'SparQ {rank}'] = sparq.dense(T, S)
    chosen[f'Loki {rank}'] = select_loki(q, k, **options).dense(T, S)
  for bits in BITS:
    plane = jax.random.normal(jax.random.key(seed + 100), (H, bits))
    chosen[f'random bits {bits}'] = by_bits(q, k, (plane, plane))
  if (
    kind == 'falling spectrum'
  ):  # of independent ones there is nothing to learn
    chosen[LEARNED] = by_bits(q, k, learned())
  return {
    name: [
      float((mask & best).sum() / best.sum()),
      float((p * mask).sum() / (p * best).sum()),
    ]
    for name, mask in chosen.items()
  }
