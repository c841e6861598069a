"""Gated slot attention: softmax over a memory of M slots (2409.07146).

  K_t = diag(alpha_t) K_{t-1} + (1 - alpha_t) k_t^T        K in R^{M x H}
  V_t = diag(alpha_t) V_{t-1} + (1 - alpha_t) v_t^T        V in R^{M x V}
  o_t = V_t^T softmax(scale * K_t q_t),                    alpha_t in (0, 1)^M

which is two gated linear attentions with a softmax between them: the first
has keys k, values 1 - alpha and decays along its values, the second has keys
1 - alpha, values v, queries the softmax, and decays along its keys.
Time is O(T C (H + V + M) + T M (H + V)) per head, the state O(M (H + V)).
`form='recurrent'` is the definition; the others agree to rounding.
"""

import functools
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import (
  additive_steps,
  chunk_states,
  forms,
  gates,
)

State: TypeAlias = tuple[Float[Array, 'B N M H'], Float[Array, 'B N M V']]


def gated_slot_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N V'],
  log_decay: Float[Array, 'B T N M'],
  *,
  scale: shapes.Scalar | None = None,
  initial_state: State | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], State]:
  """o_t = V_t^T softmax(scale * K_t q_t) over the slots of a gated memory.

  Args:
    q: queries.
    k: keys.
    v: values.
    log_decay: log alpha <= 0 per slot; a token writes 1 - alpha of itself.
      Very negative values and -inf replace what the slot holds.
    scale: factor on the logits; None is H ** -0.5.
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'chunkwise', 'recurrent', 'parallel' or None, see `linear_attention`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None, 'xla' or 'xla_parallel', see `forms.recur`.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: (K, V) after the last token, [B, N, M, H] and [B, N, M, V], float32
      (float64 for float64 inputs).
  """
  shapes.check_qkv(q, k, v)
  forms.check(form, implementation, 'gated_slot_attention')
  batch, length, heads, channels = k.shape
  if v.shape[2] != heads:
    raise ValueError(
      f'v has {v.shape[2]} heads, k has {heads}: repeat k and q to as many.'
    )
  slots = log_decay.shape[-1]
  keys, values = initial_state or (None, None)
  shapes.check_shapes(
    {
      'log_decay': (log_decay, (batch, length, heads, slots)),
      'segment_ids': (segment_ids, (batch, length)),
      'initial_state[0]': (keys, (batch, heads, slots, channels)),
      'initial_state[1]': (values, (batch, heads, slots, v.shape[-1])),
    }
  )
  dtype = shapes.accumulator(q, k, v, log_decay, initial_state)
  gate = gates.expand_log_decay(log_decay, (batch, length, heads, slots), dtype)
  if initial_state is None:
    state = tuple(
      jnp.zeros((batch, heads, slots, x.shape[-1]), dtype) for x in (k, v)
    )
  else:
    state = keys.astype(dtype), values.astype(dtype)
  q, scale = shapes.fold_scale(q, channels**-0.5 if scale is None else scale)
  out, state = forms.recur(
    functools.partial(_step, scale=scale),
    chunk_states.Chunk(
      _prepare, _advance, functools.partial(_read, scale=scale)
    ),
    (q, k, v, gate),
    state,
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  return out.astype(v.dtype), state


def _step(state, token, *, scale):
  """Keys [B,N,M,H], values [B,N,M,V]; token [B,N,X]."""
  keys, values = state
  q, k, v, gate = (x.astype(keys.dtype) for x in token)
  alpha, write = jnp.exp(gate)[..., None], -jnp.expm1(gate)[..., None]
  keys = alpha * keys + write * k[:, :, None]
  values = alpha * values + write * v[:, :, None]
  exact = dict(precision=jax.lax.Precision.HIGHEST)
  logits = jnp.einsum('bnmh,bnh->bnm', keys, q, **exact)
  weights = jax.nn.softmax(scale * logits)
  return (keys, values), jnp.einsum('bnm,bnmv->bnv', weights, values, **exact)


def _prepare(tokens, marks, *, wide):
  """What C tokens [B, N, C, X] write, and what they read of each other."""
  q, k, v, gate = tokens
  operand = shapes.operand(gate.dtype, q, k, v)
  write = -jnp.expm1(gate)
  if wide:
    sums = gates.levels(gate)
    before, after = gates.edge_sums(gate)
    inside = _logits(q, k, write, gate, _at_levels(sums), operand, marks)
  else:
    *_, (before, after) = sums = list(gates.block_sums(gate))
    before, after = before[..., 0, :, :], after[..., 0, :, :]
    inside = _logits(q, k, write, gate, _in_blocks(sums), operand, marks)
  written = write * jnp.exp(after)
  total = jnp.exp(gates.total(gate, after))[..., None]
  if marks is not None:
    written = jnp.where(marks.writes[:, None, :, None], written, 0)
  return (
    (k.astype(operand), v.astype(operand), written.astype(operand), total),
    (q.astype(operand), v, write, gate, jnp.exp(before), inside),
  )


def _advance(state, writes, marks):
  """The keys and values after a chunk, and before it for its reads."""
  k, v, written, total = writes

  def after(memory, x):
    kept = total * memory
    if marks is not None:
      kept = jnp.where(marks.keeps[:, None, None, None], kept, 0)
    return kept + product('bnjm,bnjx->bnmx', written, x, dtype=memory.dtype)

  keys, values = state
  seen = keys.astype(k.dtype), values
  return (after(keys, k), after(values, v)), seen


def _read(seen, reads, marks, *, scale, wide):
  """The softmax over slots, and a chunk of linear attention with it."""
  keys, values = seen
  q, v, write, gate, before, inside = reads
  read = before * product('bnih,bnmh->bnim', q, keys, dtype=gate.dtype)
  if marks is not None:
    read = jnp.where(marks.reads[:, None, :, None], read, 0)
  weights = jax.nn.softmax(scale * (inside + read))
  # One value head for every query and key head.
  tokens = weights, write, v[:, :, None], gate[:, :, None]
  _, second = additive_steps.prepare(tokens, marks, inclusive=True, wide=wide)
  values = values[:, :, None].astype(second[0].dtype)
  return additive_steps.read(values, second, marks, wide=wide)[:, :, 0]


def _logits(q, k, write, gate, at_levels, operand, marks):
  """The logits of C tokens among each other.

  The decay of a pair is per slot, the axis of the result, so it multiplies
  no scores: the triangle of scores is tiled by squares as in `gates`, and
  each square decays its columns before and its rows after the product.
  """

  def dot(spec, *xs):
    xs = [x.astype(operand) for x in xs]
    return product(spec, *xs, dtype=gate.dtype)

  mask = np.tri(gate.shape[-2], dtype=bool)
  if marks is not None:
    mask &= marks.same[:, None]
  scores = jnp.where(mask, dot('bnih,bnjh->bnij', q, k), 0)
  logits = jnp.diagonal(scores, axis1=-2, axis2=-1)[..., None] * write
  for rows in at_levels(dot, scores, write):
    logits = logits + rows
  return logits


def _at_levels(tiles):
  """The part of all levels, by products of whole chunks."""

  def parts(dot, scores, write):
    decay = jnp.exp(tiles.sums)
    squares = jnp.where(tiles.pairs[:, None, None], scores, 0)
    rows = dot('lbnij,lbnjm->lbnim', squares, write * decay) * decay
    yield jnp.sum(jnp.where(tiles.odd[:, None, None], rows, 0), 0)

  return parts


def _in_blocks(sums):
  """The same by products of the squares themselves."""

  def parts(dot, scores, write):
    for before, after in sums[:-1]:
      half = before.shape[-2]
      columns = write.reshape(before.shape) * jnp.exp(after)
      columns = gates.halves(columns)[0]
      rows = dot('bnpij,bnpjm->bnpim', _squares(scores, half), columns)
      rows = rows * jnp.exp(gates.halves(before)[1])
      rows = jnp.stack([jnp.zeros_like(rows), rows], axis=-3)
      yield rows.reshape(write.shape)

  return parts


def _squares(scores, half):
  """[.., C, C] to the [.., p, half, half] below the diagonal, left of it."""
  size = scores.shape[-1]
  pairs = size // (2 * half)
  blocks = scores.reshape(*scores.shape[:-2], pairs, 2, half, pairs, 2, half)
  blocks = blocks[..., 1, :, :, 0, :]  # odd rows, even columns
  return jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
