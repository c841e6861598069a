"""Selectors of a prompt: blocks, columns and diagonals of the causal map.

Each estimates the map P = softmax(Q K^T / sqrt(H)) from few of its entries and
returns what to compute of it. None is causal to the token: whoever pools the
queries of a block chooses by all of them, and whoever asks the last queries of
the prompt chooses for the first by the last. The papers accept both in a
prefill; `SELECTORS` says which it is.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks
from efficient_attn.ops.selection import scoring
from efficient_attn.ops.selection.expressions import Slashes
from efficient_attn.ops.softmax.normalizers import softmax

Query = Float[Array, 'B T N H']
Key = Float[Array, 'B S K H']


def select_streaming_llm(
  query: Query, key: Key, *, sinks: int = 4, window: int = 1020
) -> masks.Mask:
  """Sinks and a window: s < sinks or t - window < s.

  StreamingLLM, Xiao et al., https://arxiv.org/abs/2309.17453; also the A-shape
  of MInference, https://arxiv.org/abs/2407.02490. O(T (sinks + window)).
  """
  base = scoring.causal(query, key)
  near = masks.Window(window - 1, 0, base.offset)
  return base & (masks.Prefix(sinks) | near)


def select_sample_attention(
  query: Query,
  key: Key,
  *,
  sample: float = 0.05,
  window: float = 0.08,
  coverage: float = 0.95,
) -> masks.Mask:
  """A window and the columns that sampled queries attend to.

  Columns are the fewest that hold `coverage` of sum_r P_rs over every
  1 / sample-th query r; the window is a share of S. SampleAttention, Zhu et
  al., https://arxiv.org/abs/2406.15486. O(sample T S H) to select.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  rows = jnp.arange(T - 1, -1, -max(int(1 / sample), 1))
  scores = scoring.logits(query[:, rows], key)
  p = softmax(scores, jnp.arange(S) <= rows[:, None] + base.offset)
  columns = scoring.cover(p.sum(2, keepdims=True), coverage)
  near = masks.Window(scoring.count(window, S) - 1, 0, base.offset)
  return base & (near | masks.Dense(columns))


def select_sparge(
  query: Query,
  key: Key,
  *,
  block_q: int = 128,
  block_k: int = 64,
  coverage: float = 0.9,
  similarity: float = 0.5,
  skip_below: float | None = None,
  causal: bool = True,
) -> masks.Mask:
  """The blocks that hold `coverage` of the map between block means.

  A block whose tokens are not alike, with a mean cosine below `similarity`, is
  not judged by its mean but always computed, as a row or a column. Second, a
  tile is left out where max_i(max_j S_ij - m_i) < skip_below, m_i being the
  largest logit of row i so far: its P V would weigh less than e^skip_below.
  The paper's kernel still counts such a tile in the denominator.
  SpargeAttn, Zhang et al., https://arxiv.org/abs/2502.18137. O(T S H / block_q
  block_k) to select; `skip_below` looks at every logit, as the kernel does.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  seen, own = scoring.tiles(T, S, block_q, block_k)
  if not causal:
    base, seen, own = masks.Window(None, None), seen | True, own & False
  mean_q, mean_k = scoring.pool(query, block_q), scoring.pool(key, block_k)
  alike_q = _self_similarity(query, block_q) >= similarity
  alike_k = _self_similarity(key, block_k) >= similarity
  alike_k = jnp.repeat(alike_k, query.shape[2] // key.shape[2], axis=1)
  scores = scoring.logits(mean_q, mean_k)
  p = softmax(scores, seen & alike_k[:, :, None])
  kept = scoring.cover(p, coverage) | ~alike_q[..., None]
  kept = kept | ~alike_k[:, :, None] | own
  if skip_below is not None:
    full = jnp.where(base.dense(T, S), scoring.logits(query, key), -jnp.inf)
    tile = full.reshape(*full.shape[:3], -1, block_k).max(-1)
    tile = jnp.where(jnp.repeat(kept, block_q, axis=2), tile, -jnp.inf)
    running = lax.cummax(tile, axis=3)
    below = jnp.where(tile == -jnp.inf, -jnp.inf, tile - running)
    below = below.reshape(*kept.shape[:3], block_q, -1).max(3)
    kept = kept & (below >= skip_below)
  return base & masks.Blocks(kept & seen, block_q, block_k)


def _self_similarity(x: Array, size: int) -> Float[Array, 'B N I']:
  """The mean cosine between the tokens of every block."""
  # The sum over pairs is the squared length of the sum of unit vectors.
  unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
  return jnp.square(scoring.pool(unit, size)).sum(-1).transpose(0, 2, 1)


def _by_distance(p: Float[Array, 'B N L S']) -> Float[Array, 'B N S']:
  """What the last L queries give to every distance, the query's own first."""
  L, S = p.shape[2:]
  source = S - L + jnp.arange(L)[:, None] - jnp.arange(S)
  found = jnp.take_along_axis(p, jnp.maximum(source, 0)[None, None], axis=3)
  return jnp.where(source >= 0, found, 0).sum(2)


def select_vertical_slash(
  query: Query,
  key: Key,
  *,
  last: int = 64,
  num_vertical: int = 1000,
  num_slash: int = 6096,
) -> masks.Mask:
  """The columns and the diagonals that the last queries attend to most.

  The query's own diagonal always counts. MInference, Jiang et al.,
  https://arxiv.org/abs/2407.02490. O(last S H) to select.
  """
  base = scoring.causal(query, key)
  p = scoring.probabilities(query[:, -last:], key)
  vertical = scoring.top(p.sum(2), num_vertical)
  slash = scoring.top(_by_distance(p).at[..., 0].set(jnp.inf), num_slash)
  columns = masks.Dense(vertical[:, :, None])
  return base & (columns | Slashes(slash, base.offset))


def select_block_sparse(
  query: Query, key: Key, *, block_size: int = 64, top_k: int = 100
) -> masks.Mask:
  """The `top_k` blocks of keys that match a block of queries by their means.

  The queries' own block is among them. MInference, Jiang et al.,
  https://arxiv.org/abs/2407.02490. O(T S H / block_size^2) to select.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  seen, own = scoring.tiles(T, S, block_size, block_size)
  scores = scoring.logits(*(scoring.pool(x, block_size) for x in (query, key)))
  scores = jnp.where(own, jnp.inf, jnp.where(seen, scores, -jnp.inf))
  kept = scoring.top(scores, top_k)
  return base & masks.Blocks(kept, block_size, block_size)


def select_minference(
  query: Query,
  key: Key,
  *,
  streaming_llm: dict,
  vertical_slash: dict,
  block_sparse: dict,
) -> masks.Mask:
  """For each head that of the three patterns that keeps the most of P.

  Takes the options of the three. MInference, Jiang et al.,
  https://arxiv.org/abs/2407.02490, which decides offline, on one prompt, by the
  error of the output; the mass is told without the values.
  """
  candidates = (
    select_streaming_llm(query, key, **streaming_llm),
    select_vertical_slash(query, key, **vertical_slash),
    select_block_sparse(query, key, **block_sparse),
  )
  base = scoring.causal(query, key)
  mass = jnp.stack(
    [scoring.retained_mass(query, key, m, base) for m in candidates]
  )
  best = jnp.argmax(mass.mean(2), axis=0)[..., None, None]
  chosen = [masks.Dense(best == i) & m for i, m in enumerate(candidates)]
  return chosen[0] | chosen[1] | chosen[2]


def select_flex_prefill(
  query: Query,
  key: Key,
  *,
  block_size: int = 128,
  coverage: float = 0.95,
  divergence: float = 0.1,
) -> masks.Mask:
  """Blocks where block means tell the truth, else columns and diagonals.

  The last block of queries decides for each head: where sqrt(JSD) between the
  block sums of its P and the softmax of pooled keys is below `divergence`, the
  fewest blocks of the whole pooled map that hold `coverage`; elsewhere the
  fewest columns and the fewest diagonals that do. FlexPrefill, Lai et al.,
  https://arxiv.org/abs/2502.20766. O(block_size S H) to select.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  p = scoring.probabilities(query[:, -block_size:], key)
  pooled_q, pooled_k = (scoring.pool(x, block_size) for x in (query, key))
  seen, own = scoring.tiles(T, S, block_size, block_size)
  pooled = softmax(scoring.logits(pooled_q, pooled_k), seen)

  true = p.mean(2).reshape(*p.shape[:2], -1, block_size).sum(-1)
  middle = (true + pooled[:, :, -1]) / 2
  entropies = [_entropy(x) for x in (middle, true, pooled[:, :, -1])]
  jsd = entropies[0] - (entropies[1] + entropies[2]) / 2
  by_block = jnp.sqrt(jnp.maximum(jsd, 0)) < divergence
  by_block = masks.Dense(by_block[..., None, None])

  flat = pooled.reshape(*pooled.shape[:2], -1)
  kept = scoring.cover(flat, coverage).reshape(pooled.shape) | own
  columns = masks.Dense(scoring.cover(p.sum(2, keepdims=True), coverage))
  slash = scoring.cover(_by_distance(p), coverage).at[..., 0].set(True)
  lines = columns | Slashes(slash, base.offset)
  blocks = masks.Blocks(kept, block_size, block_size)
  return base & (by_block & blocks | ~by_block & lines)


def _entropy(p):
  return -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), axis=-1)


def antidiagonal_sums(
  query: Query, key: Key, stride: int
) -> Float[Array, 'B N I J']:
  """sum_r q_{i stride + r} . k_{j stride + stride - 1 - r} / sqrt(H).

  `stride` tokens become one with stride H channels, the queries' in reverse:
  one product of T/stride by S/stride rows.
  """

  def fold(x, step):
    B, T, N, H = x.shape
    x = x.reshape(B, scoring.divide(T, stride), stride, N, H)[:, :, ::step]
    return x.swapaxes(2, 3).reshape(B, -1, N, stride * H)

  return scoring.logits(fold(query, -1), fold(key, 1)) * stride**0.5


def select_xattention(
  query: Query,
  key: Key,
  *,
  block_size: int = 128,
  stride: int = 8,
  coverage: float = 0.9,
  causal: bool = True,
) -> masks.Mask:
  """The fewest blocks that hold `coverage` of a map of antidiagonal sums.

  A softmax over the sums of each `stride` x `stride` square, divided by
  stride, summed over blocks. Every column and diagonal of a block crosses one
  of its antidiagonals. XAttention, Xu et al., https://arxiv.org/abs/2503.16428.
  O(T S H / stride) to select.
  """
  base = scoring.causal(query, key)
  T, S = query.shape[1], key.shape[1]
  seen, own = scoring.tiles(T, S, block_size, block_size)
  squares, _ = scoring.tiles(T, S, stride, stride)
  if not causal:
    base, seen, own = masks.Window(None, None), seen | True, own & False
    squares = squares | True
  sums = antidiagonal_sums(query, key, stride) / stride
  p = softmax(sums, squares)
  (I, J), inner = seen.shape, scoring.divide(block_size, stride)
  p = p.reshape(*p.shape[:2], I, inner, J, inner).sum((3, 5))
  kept = scoring.cover(p, coverage) | own
  return base & masks.Blocks(kept & seen, block_size, block_size)
