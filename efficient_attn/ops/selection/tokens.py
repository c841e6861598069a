"""Selectors of a step of decoding: the keys that one query reads.

Every query chooses for itself and sees only what stands before it, so that a
prompt selects what its tokens would one step at a time. (Loki needs axes from
elsewhere for that.)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops import masks, scores
from efficient_attn.ops.products import product
from efficient_attn.ops.selection import scoring
from efficient_attn.ops.softmax.normalizers import softmax

Query = Float[Array, 'B T N H']
Key = Float[Array, 'B S K H']


def page_bounds(
  query: Query, key: Key, page_size: int
) -> Float[Array, 'B N T P']:
  """sum_h max(q_h min_h, q_h max_h), at least q . k of every key of a page."""
  B, S, K, H = key.shape
  pages = key.reshape(B, scoring.divide(S, page_size), page_size, K, H)

  def product(q, k):  # undoes the scale of `logits`
    return scoring.logits(q, k) * H**0.5

  above, below = jnp.maximum(query, 0), jnp.minimum(query, 0)
  return product(above, pages.max(2)) + product(below, pages.min(2))


def select_quest(
  query: Query, key: Key, *, page_size: int = 16, top_k: int = 64
) -> masks.Mask:
  """The `top_k` pages whose upper bound of q . k is the largest.

  The query's own page is one of them. Quest, Tang et al.,
  https://arxiv.org/abs/2406.10774. O(S H / page_size) a query to select.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  pad = -S % page_size  # nobody reads the bound of a page that is not full
  bounds = page_bounds(
    query, jnp.pad(key, ((0, 0), (0, pad), (0, 0), (0, 0))), page_size
  )
  own = (jnp.arange(T)[:, None] + base.offset) // page_size
  page = jnp.arange(bounds.shape[-1])
  bounds = jnp.where(page < own, bounds, -jnp.inf)
  bounds = jnp.where(page == own, jnp.inf, bounds)
  return base & masks.Blocks(scoring.top(bounds, top_k), 1, page_size)


def _top_tokens(scores, base, top_k) -> masks.Mask:
  seen = base.dense(*scores.shape[2:])
  return masks.Dense(scoring.top(jnp.where(seen, scores, -jnp.inf), top_k))


def sparq_scores(query: Query, key: Key, rank: int) -> Float[Array, 'B N T S']:
  """P as the `rank` channels of largest |q| show it.

  Its temperature is sqrt(H |q_r|_1 / |q|_1), with q_r those channels of q.
  """
  size = jnp.abs(query)
  large = jnp.where(scoring.top(size, rank), query, 0)
  whole = size.sum(-1)
  kept = jnp.where(whole > 0, jnp.abs(large).sum(-1) / whole, 1)
  found = scoring.logits(large, key) / jnp.sqrt(kept.mT[..., None])
  T, S = query.shape[1], key.shape[1]
  return softmax(found, scoring.causal(query, key).dense(T, S))


def select_sparq(
  query: Query, key: Key, *, rank: int = 32, top_k: int = 128, local: int = 32
) -> masks.Mask:
  """The `top_k` keys by the `rank` largest channels of the query.

  The last `local` keys are among them. SparQ, Ribar et al.,
  https://arxiv.org/abs/2312.04985. O(S rank) a query to select, of keys stored
  by channel.
  """
  base, p = scoring.causal(query, key), sparq_scores(query, key, rank)
  near = masks.Window(local - 1, 0, base.offset).dense(*p.shape[2:])
  return _top_tokens(jnp.where(near, jnp.inf, p), base, top_k)


def principal_axes(key: Key) -> Float[Array, 'B K H H']:
  """The principal components of each head's keys, the largest first."""
  centred = key - key.mean(1, keepdims=True)
  covariance = product('bskh,bskg->bkhg', centred, centred)
  return jnp.linalg.eigh(covariance)[1][..., ::-1]


def select_loki(
  query: Query,
  key: Key,
  *,
  rank: int = 32,
  top_k: int = 128,
  axes: Float[Array, '#B K H H'] | None = None,
) -> masks.Mask:
  """The `top_k` keys by q . k in the `rank` first principal axes of keys.

  The axes come from calibration, or else from these keys. Loki, Singhania et
  al., https://arxiv.org/abs/2406.02542. O(S rank) a query to select.
  """
  base = scoring.causal(query, key)
  axes = (principal_axes(key) if axes is None else axes)[..., :rank]
  axes = jnp.broadcast_to(axes, (len(key), *axes.shape[1:]))
  axes_q = jnp.repeat(axes, query.shape[2] // key.shape[2], axis=1)
  q = product('btnh,bnhr->btnr', query, axes_q)
  k = product('bskh,bkhr->bskr', key, axes)
  return _top_tokens(scoring.logits(q, k), base, top_k)


def select_magicpig(
  query: Query,
  key: Key,
  *,
  num_bits: int = 10,
  num_tables: int = 150,
  sinks: int = 4,
  window: int = 64,
  seed: int | Int[Array, ''] = 0,
) -> tuple[masks.Mask, scores.Score]:
  """Keys drawn by hashing, and the bias -log u that corrects for it.

  A key is drawn where two of `num_tables` hashes, each the signs of `num_bits`
  random projections, equal the query's: with p = (1 - angle / pi)^num_bits,

    u = 1 - (1 - p)^L - L p (1 - p)^(L - 1),   o = softmax(q . k_s - log u_s) v

  Sinks and window are always read, with u = 1. Sums of e^(q . k) / u are
  unbiased estimates; o, a ratio of two, is not. MagicPig, Chen et al.,
  https://arxiv.org/abs/2410.16179, which also subtracts the mean from the keys
  first: left to the caller, as softmax does not see it. O(S) a query to
  select, less with tables in memory.
  """
  base = scoring.causal(query, key)
  B, T, N, H = query.shape
  S, L = key.shape[1], num_tables
  key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
  planes = jax.random.normal(
    jax.random.key(seed), (num_bits, L, H), query.dtype
  )

  def signs(x):
    return product('bsnh,clh->bnslc', x, planes) > 0

  def add_table(hits, table):
    q, k = table
    return hits + (q[:, :, :, None] == k[:, :, None]).all(-1), None

  tables = tuple(jnp.moveaxis(signs(x), 3, 0) for x in (query, key))
  hits, _ = lax.scan(add_table, jnp.zeros((B, N, T, S), jnp.int32), tables)

  unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
  cosine = product('btnh,bsnh->bnts', *unit).clip(-1, 1)
  p = (1 - jnp.arccos(cosine) / jnp.pi) ** num_bits
  # The formula above, where the differences lose the least of what is small.
  u = -jnp.expm1((L - 1) * jnp.log1p(-p) + jnp.log1p((L - 1) * p))

  near = masks.Window(window - 1, 0, base.offset)
  always = (masks.Prefix(sinks) | near).dense(T, S)
  drawn = (hits >= 2) & (u > 0)
  bias = -jnp.log(jnp.where(drawn & ~always, u, 1))
  bias = scores.Dense(lax.stop_gradient(bias))
  return base & masks.Dense(always | drawn), bias


def select_infllm(
  query: Query,
  key: Key,
  *,
  block_size: int = 128,
  representatives: int = 4,
  sinks: int = 128,
  window: int = 4096,
  top_k: int = 16,
) -> masks.Mask:
  """Sinks, a window, and the `top_k` blocks of memory nearest to the query.

  A block stands for the mean of the keys that score highest by the mean of
  q_l . k_j over the `window` queries l after them (the survey writes P_lj,
  which exists only inside the window). It becomes memory when all of those
  have passed, so that no query looks ahead; until then it stays readable.
  InfLLM, Xiao et al., https://arxiv.org/abs/2402.04617. O(S H / block_size) a
  query to select.
  """
  base = scoring.causal(query, key)
  B, S, K, H = key.shape
  if query.shape[1] != S:
    raise ValueError(
      f'the queries of all S = {S} positions choose the representatives, but'
      f' query has T = {query.shape[1]}.'
    )
  blocks = scoring.divide(S, block_size)
  total = jnp.pad(query, ((0, 0), (1, 0), (0, 0), (0, 0)))
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  total = jnp.cumsum(total.astype(dtype), axis=1)
  after = jnp.minimum(jnp.arange(S) + window + 1, S)
  mean = (total[:, after] - total[:, 1:]) / window
  keys = jnp.repeat(key, query.shape[2] // K, axis=2)
  score = product('bsnh,bsnh->bns', mean, keys)
  best = scoring.top(score.reshape(B, -1, blocks, block_size), representatives)
  keys = keys.reshape(B, blocks, block_size, -1, H)
  share = best / best.sum(-1, keepdims=True)
  centre = product('bnis,bisnh->binh', share, keys, operand=key.dtype)
  memory = scoring.logits(query, centre.astype(key.dtype))
  complete = (jnp.arange(blocks) + 1) * block_size + window
  complete = complete <= jnp.arange(S)[:, None] + 1
  chosen = scoring.top(jnp.where(complete, memory, -jnp.inf), top_k)
  near = masks.Window(window - 1, 0) | masks.Prefix(sinks)
  return base & (near | masks.Blocks(chosen | ~complete, 1, block_size))


def select_retrieval(
  query: Query,
  key: Key,
  *,
  sinks: int = 128,
  window: int = 512,
  top_k: int = 100,
) -> masks.Mask:
  """Sinks, a window, and the `top_k` other keys of largest q . k.

  An exact index: the recall that RetrievalAttention's approximate one, fitted
  to queries rather than keys, can reach at best. The paper attends to the two
  sets on two devices and joins them as `attention_merge.merge` does. Liu et
  al., https://arxiv.org/abs/2409.10516. O(S H) a query to select.
  """
  base = scoring.causal(query, key)
  near = masks.Prefix(sinks) | masks.Window(window - 1, 0, base.offset)
  scores = scoring.logits(query, key)
  return base & (near | _top_tokens(scores, base & ~near, top_k))
