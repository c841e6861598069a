"""Log-linear attention (Guo et al. 2506.04761): a state per power of two.

  o_t = scale sum_{s <= t} lambda_t[level(t, s)] exp(D_ts) (q_t . k_s) v_s
  level(t, s) = number of binary digits of t XOR s
  D_ts = sum of the log decays of (s, t]

Level 0 is the token itself. The tokens before it stand in the buckets of a
Fenwick tree, one of 2^m tokens for every binary digit m of t that is set, and
bucket m is level m + 1. After token t the buckets below the lowest digit of
t that is 0, and the token, become the bucket of that digit. With all lambda
equal it is linear attention with a scalar gate (Mamba-2, 2405.21060).

Tokens are counted from the start of their segment. Where L levels are too few
for a sequence, the last level holds everything further away. Time is
O(T (C + H log T) V) for chunks of C, the state O(H V log T).
`form='recurrent'` is the definition; the others agree to rounding.
"""

import functools
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import chunk_states, forms, gates

# The buckets, and how many tokens of the segment they hold.
Buckets: TypeAlias = tuple[Float[Array, 'B N M H V'], Int[Array, 'B']]


def log_linear_attention(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  *,
  log_decay: Float[Array, 'B T N'],
  level_scales: Float[Array, 'B T N L'],
  scale: shapes.Scalar | None = None,
  initial_state: Buckets | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Buckets]:
  """Linear attention whose tokens weigh by how far back their bucket is.

  Args:
    q: queries.
    k: keys.
    v: values; value head n reads query and key head n // (N // K).
    log_decay: <= 0 per token; it decays what is before the token.
    level_scales: lambda, the weight of every level, L >= 2 of them; 2^(L - 1)
      tokens fill L levels.
    scale: factor on the output; None is H ** -0.5.
    initial_state: the state before token 0, part of the first segment, with
      at most L - 1 buckets. It may hold fewer where no more will be needed.
    segment_ids: state and count are reset at every token whose id differs
      from the id of the token before it.
    form: 'chunkwise', 'recurrent', 'parallel' or None, see
      `linear_attention`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None, 'xla' or 'xla_parallel', see `forms.recur`.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: M = L - 1 buckets (those of `initial_state` where given) [B, N, M,
      H, V] in float32 (float64 for float64 inputs) and the count [B].
  """
  _check(q, k, v, log_decay, level_scales, initial_state, segment_ids)
  forms.check(form, implementation, 'log_linear_attention')
  batch, length, kv_heads, channels = k.shape
  heads = v.shape[2]
  dtype = shapes.accumulator(q, k, v, log_decay, level_scales)
  if initial_state is None:
    shape = (batch, heads, level_scales.shape[-1] - 1, channels, v.shape[-1])
    initial_state = jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32)
  memory, count = initial_state
  dtype = jnp.promote_types(dtype, memory.dtype)
  gate = gates.expand_log_decay(
    log_decay, (batch, length, heads, channels), dtype
  )
  values, gate, scales = (
    shapes.group(x, kv_heads, axis=2)
    for x in (v, gate, level_scales.astype(dtype))
  )
  memory = shapes.group(memory.astype(dtype), kv_heads, axis=1)
  # Tokens and states are floating; float32 counts 2^24 tokens.
  counted = jnp.ones((batch, length, 1), dtype)
  out, (memory, count) = forms.recur(
    _step,
    chunk_states.Chunk(_prepare, _advance, _read),
    (q, k, values, gate, scales, counted),
    (memory, count.astype(dtype)),
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  out = out.reshape(batch, length, heads, -1)
  out = out * (channels**-0.5 if scale is None else scale)
  memory = memory.reshape(batch, heads, *memory.shape[3:])
  return out.astype(v.dtype), (memory, count.astype(jnp.int32))


def _digits(x: Int[Array, '...']) -> Int[Array, '...']:
  """The number of binary digits; 0 has none."""
  return 32 - lax.clz(x)


def _merge(memory, before, after):
  """Buckets of `before` tokens to those of `after`, and where new ones go.

  Returns:
    memory: [B, K, G, M, H, V]; the bucket of the highest digit that changes
      takes all below it. Digits past the last bucket count as the last.
    slots: token position [B, ...] to its bucket among `after` tokens.
  """
  last = memory.shape[3] - 1

  def slots(position):
    to = after.reshape(-1, *[1] * (position.ndim - 1))
    return jnp.minimum(_digits(position ^ to) - 1, last)

  index = np.arange(last + 1)[:, None, None]
  target = slots(before).reshape(-1, 1, 1, 1, 1, 1)
  below = jnp.where(index < target, memory, 0)
  joined = memory + jnp.sum(below, axis=3, keepdims=True)
  memory = jnp.where(index == target, joined, memory - below)
  return memory, slots


def _step(state, token):
  """q, k [B,K,H], v [B,K,G,V], gate [B,K,G,1], scales [B,K,G,L]."""
  memory, count = state
  q, k, v, gate, scales, _ = token
  q, k, v = (x.astype(memory.dtype) for x in (q, k, v))
  size = memory.shape[3]
  memory = jnp.exp(gate)[..., None, None] * memory
  reads = jnp.einsum(
    'bkh,bkgmhv->bkgmv', q, memory, precision=lax.Precision.HIGHEST
  )
  weights = scales[..., 1 : size + 1, None]
  own = scales[..., :1] * jnp.sum(q * k, -1)[:, :, None, None]
  out = own * v + jnp.sum(weights * reads, -2)
  index = count.astype(jnp.int32)
  memory, slots = _merge(memory, index, index + 1)
  here = np.arange(size) == slots(index)[:, None]
  keys = k[:, :, None] * here[:, None, :, None]
  write = keys[:, :, None, ..., None] * v[..., None, None, :]
  return (memory + write, count + 1), out


def _prepare(tokens, marks, *, wide):
  """What of C tokens [B, K, (G,) C, X] depends on no place in the segment."""
  q, k, v, gate, scales, counted = tokens
  dtype = gate.dtype
  operand = shapes.operand(dtype, q, k, v)
  spans, before, past = gates.span_sums(gate[..., 0], wide=wide)
  scores = product(
    'bkih,bkjh->bkij',
    q.astype(operand),
    k.astype(operand),
    dtype=dtype,
  )
  value = v.astype(dtype) * jnp.exp(past)[..., None]
  if marks is not None:
    value = jnp.where(marks.writes[:, None, None, :, None], value, 0)
  total = jnp.exp(gates.total(gate, past[..., None]))[..., None, None]
  return (
    (k.astype(operand), value.astype(operand), total, counted),
    (
      q.astype(operand),
      v.astype(operand),
      scores[:, :, None] * jnp.exp(spans),
      jnp.exp(before)[..., None],
      scales,
      counted,
    ),
  )


def _places(count, counted, marks):
  """The positions in their segments of C tokens, and the count after them.

  Tokens that fill the chunk up do not count.
  """
  count, counted = (x.astype(jnp.int32) for x in (count, counted[..., 0]))
  add = functools.partial(jnp.sum, axis=-1, dtype=jnp.int32)
  if marks is None:
    upto = jnp.cumsum(counted, axis=1, dtype=jnp.int32)
    return count[:, None] + upto - counted, count + add(counted)
  earlier = np.tri(counted.shape[-1], k=-1, dtype=bool)
  position = add((earlier & marks.same) * counted[:, None])
  position += jnp.where(marks.reads, count[:, None], 0)
  after = add(jnp.where(marks.writes, counted, 0))
  after += jnp.where(marks.keeps, count, 0)
  return position, after


def _advance(state, writes, marks):
  """The buckets after a chunk, and before it for its reads."""
  memory, count = state
  k, value, total, counted = writes
  seen = memory.astype(k.dtype), count
  position, after = _places(count, counted, marks)
  memory, slots = _merge(memory, count.astype(jnp.int32), after)
  memory = total * memory
  if marks is not None:
    keeps = marks.keeps.reshape(-1, *[1] * (memory.ndim - 1))
    memory = jnp.where(keeps, memory, 0)
  here = slots(position)[..., None] == np.arange(memory.shape[3])
  keys = jnp.where(here[:, None, ..., None], k[:, :, :, None], 0)
  write = product('bkjmh,bkgjv->bkgmhv', keys, value, dtype=memory.dtype)
  return (memory + write, after.astype(count.dtype)), seen


def _read(seen, reads, marks, *, wide):
  """The outputs of a chunk: of its own tokens, and of the buckets before it."""
  del wide
  memory, count = seen
  q, v, scores, before, scales, counted = reads
  size = memory.shape[3]
  position, _ = _places(count, counted, marks)
  count = count.astype(jnp.int32)

  def dot(spec, *xs):
    xs = [x.astype(q.dtype) for x in xs]
    return product(spec, *xs, dtype=scores.dtype)

  def pick(levels):  # [B, C, X] to the scales [B, K, G, C, X]
    levels = jnp.minimum(levels, size)[:, None, None, ..., None]
    chosen = levels == np.arange(size + 1)
    return jnp.sum(jnp.where(chosen, scales[..., None, : size + 1], 0), -1)

  lower = np.tri(v.shape[-2], dtype=bool)
  if marks is not None:
    lower = (lower & marks.same)[:, None, None]
  scores = scores * pick(_digits(position[:, :, None] ^ position[:, None]))
  inside = dot('bkgij,bkgjv->bkgiv', jnp.where(lower, scores, 0), v)

  # A bucket is read at its own level until a higher digit changes.
  moved = _digits(position ^ count[:, None])[..., None]
  weights = pick(jnp.maximum(np.arange(1, size + 1), moved))
  queries = (before * weights)[..., None]
  queries = queries * q[:, :, None, :, None].astype(scores.dtype)
  read = dot('bkgimh,bkgmhv->bkgiv', queries, memory)
  if marks is not None:
    read = jnp.where(marks.reads[:, None, None, :, None], read, 0)
  return inside + read


def _check(q, k, v, log_decay, level_scales, state, segment_ids):
  shapes.check_qkv(q, k, v)
  lead = v.shape[:3]
  if level_scales.ndim != 4 or level_scales.shape[-1] < 2:
    raise ValueError(
      f'level_scales has shape {level_scales.shape}: pass {(*lead, "L")} with '
      'L >= 2 levels.'
    )
  levels = level_scales.shape[-1]
  wanted = {
    'level_scales': (level_scales, (*lead, levels)),
    'log_decay': (log_decay, lead),
    'segment_ids': (segment_ids, lead[:2]),
  }
  if state is not None:
    memory, count = state
    buckets = memory.shape[2] if memory.ndim == 5 else levels - 1
    if not 1 <= buckets < levels:
      raise ValueError(
        f'initial_state has {buckets} buckets, level_scales {levels} levels: '
        'pass at least one bucket and fewer buckets than levels.'
      )
    shape = (lead[0], lead[2], buckets, k.shape[-1], v.shape[-1])
    wanted['initial_state[0]'] = (memory, shape)
    wanted['initial_state[1]'] = (count, lead[:1])
  shapes.check_shapes(wanted)
