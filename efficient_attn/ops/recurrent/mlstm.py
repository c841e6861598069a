"""mLSTM: matrix memory with an exponential input gate (xLSTM, 2405.04517).

  C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T,    n_t = f_t n_{t-1} + exp(i_t) k_t,
  h_t = C_t^T q_t / max(|n_t . q_t|, 1),     q scaled by H^-1/2.

exp(i_t) overflows, so the state holds C' = C exp(-m) and n' = n exp(-m) with

  m_t = max(log f_t + m_{t-1}, i_t, 0),      m = 0 in the empty state,
  h_t = C'_t^T q_t / max(|n'_t . q_t|, exp(-m_t)).

h does not depend on m. The paper's m has no floor at zero; with it exp(-m)
cannot overflow when all gates are very negative, and a state of zeros is the
empty state. In a chunk m_t is the maximum over the tokens j <= t of i_j plus
the forget gates of (j, t], each a plain sum, so no exponent is positive.
Time is O(T C (H + V) + T H V) per head for chunks of C, the state O(H V).
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
from efficient_attn.ops.recurrent import chunk_states, forms, gates

State: TypeAlias = tuple[
  Float[Array, 'B N H V'], Float[Array, 'B N H'], Float[Array, 'B N']
]

# Sums of forget gates stop here where they are products, which cannot hold
# infinities; no input gate makes up for it.
LOWEST_SUM = -1e37


def mlstm(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T N V'],
  input_gate: Float[Array, 'B T N'],
  log_forget: Float[Array, 'B T N'],
  *,
  scale: shapes.Scalar | None = None,
  eps: float = 0.0,
  initial_state: State | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], State]:
  """C_t = f_t C_{t-1} + exp(i_t) k_t v_t^T, h = C^T q / max(|n . q|, 1).

  Args:
    q: queries.
    k: keys, used as given.
    v: values; value head n reads query and key head n // (N // K).
    input_gate: i, the logarithm of the input gate; of any size and sign.
    log_forget: log f <= 0, e.g. jax.nn.log_sigmoid. -inf is an exact reset.
    scale: factor on q, in the numerator and in n . q; None is H ** -0.5.
    eps: added to max(|n' . q|, exp(-m)), as the code of xLSTM-7B does.
    initial_state: the state before token 0, part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'chunkwise', 'recurrent', 'parallel' or None, see `linear_attention`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None, 'xla' or 'xla_parallel', see `forms.recur`.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: (C', n', m) after the last token, [B, N, H, V], [B, N, H] and
      [B, N], float32 (float64 for float64 inputs). The memory of the paper
      is C' exp(m).
  """
  shapes.check_qkv(q, k, v)
  forms.check(form, implementation, 'mlstm')
  batch, length, kv_heads, channels = k.shape
  heads = v.shape[2]
  memory_shape = (batch, heads, channels, v.shape[-1])
  c, n, m = initial_state or (None, None, None)
  shapes.check_shapes(
    {
      'input_gate': (input_gate, (batch, length, heads)),
      'log_forget': (log_forget, (batch, length, heads)),
      'segment_ids': (segment_ids, (batch, length)),
      'initial_state[0]': (c, memory_shape),
      'initial_state[1]': (n, memory_shape[:3]),
      'initial_state[2]': (m, memory_shape[:2]),
    }
  )
  dtype = shapes.accumulator(q, k, v, input_gate, log_forget, initial_state)
  shapes.check_log_decay(log_forget)
  # As given: beside exp(i) no forget gate is too small to matter but -inf,
  # which plain sums keep.
  forget = log_forget.astype(dtype)[..., None]
  if initial_state is None:
    memory = jnp.zeros((*memory_shape[:3], memory_shape[3] + 1), dtype)
    m = jnp.zeros(memory_shape[:2], dtype)
  else:
    memory = jnp.concatenate([c, n[..., None]], -1).astype(dtype)
    m = m.astype(dtype)

  # A column of ones makes n the last column of the memory.
  values = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
  q, scale = shapes.fold_scale(q, channels**-0.5 if scale is None else scale)
  grouped = [
    shapes.group(x, kv_heads, axis=2)
    for x in (values, input_gate.astype(dtype)[..., None], forget)
  ]
  out, state = forms.recur(
    functools.partial(_step, scale=scale, eps=eps),
    chunk_states.Chunk(
      _prepare, _advance, functools.partial(_read, scale=scale, eps=eps)
    ),
    (q, k, *grouped),
    tuple(shapes.group(x, kv_heads, axis=1) for x in (memory, m)),
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  memory, m = (x.reshape(batch, heads, *x.shape[3:]) for x in state)
  out = out.reshape(batch, length, heads, -1)
  return out.astype(v.dtype), (memory[..., :-1], memory[..., -1], m)


def _step(state, token, *, scale, eps):
  """Memory [B,K,G,H,V+1], m [B,K,G]; q, k [B,K,H], the rest [B,K,G,X]."""
  memory, m = state
  q, k, v, gate, forget = token
  q, k, v = (x.astype(memory.dtype) for x in (q, k, v))
  gate, carried = gate[..., 0], forget[..., 0] + m
  m = jnp.maximum(jnp.maximum(carried, gate), 0)
  write = k[:, :, None, :, None] * v[..., None, :]
  memory = (
    jnp.exp(carried - m)[..., None, None] * memory
    + jnp.exp(gate - m)[..., None, None] * write
  )
  out = jnp.einsum(
    'bkh,bkghv->bkgv', q, memory, precision=jax.lax.Precision.HIGHEST
  )
  return (memory, m), _normalize(scale * out, m, eps)


def _prepare(tokens, marks, *, wide):
  """What C tokens [B, K, (G,) C, X] write and read, each at a maximum so far.

  Weights are exponentials of plain sums of gates, less the maximum over the
  chunk's own tokens; `_advance` and `_read` bring them to that with the state.
  """
  q, k, v, gate, forget = tokens
  dtype = gate.dtype
  operand = shapes.operand(dtype, q, k, v)

  def dot(spec, *xs):
    xs = [x.astype(operand) for x in xs]
    return product(spec, *xs, dtype=dtype)

  gate, forget = gate[..., 0], forget[..., 0]
  if wide:
    forget = jnp.maximum(forget, LOWEST_SUM / forget.shape[-1])
  spans, before, after = gates.span_sums(forget, wide=wide)
  mask = np.tri(v.shape[-2], dtype=bool)
  # The logarithms of all weights: of pairs, of the state before the chunk in
  # what a token reads, of tokens and of that state in the state after.
  carried, writes = before, after + gate
  kept = gates.total(forget[..., None], after[..., None])
  if marks is not None:
    mask &= marks.same[:, None, None]
    carried = jnp.where(marks.reads[:, None, None], carried, -jnp.inf)
    writes = jnp.where(marks.writes[:, None, None], writes, -jnp.inf)
    kept = jnp.where(marks.keeps[:, None, None, None], kept, -jnp.inf)
  pairs = jnp.where(mask, spans + gate[..., None, :], -jnp.inf)

  row = jnp.maximum(jnp.max(pairs, -1), 0)[..., None]
  scores = dot('bkih,bkjh->bkij', q, k)[:, :, None]
  inside = dot('bkgij,bkgjv->bkgiv', scores * jnp.exp(pairs - row), v)
  top = jnp.maximum(jnp.max(writes, -1), 0)[..., None]
  value = v.astype(dtype) * jnp.exp(writes - top)[..., None]
  return (
    (k.astype(operand), value.astype(operand), top, kept),
    (q.astype(operand), inside, row, carried[..., None]),
  )


def _advance(state, writes, marks):
  """The state after a chunk, and before it for its reads."""
  del marks
  memory, m = state
  key, value, top, kept = writes
  top, kept = top[..., 0], kept[..., 0] + m
  after = jnp.maximum(top, kept)
  write = product('bkjh,bkgjv->bkghv', key, value, dtype=memory.dtype)
  new = jnp.exp(kept - after)[..., None, None] * memory
  new = new + jnp.exp(top - after)[..., None, None] * write
  return (new, after), (memory.astype(key.dtype), m)


def _read(seen, reads, marks, *, scale, eps, wide):
  """The outputs of a chunk: of its own tokens, and of the state before it."""
  del marks, wide
  memory, m = seen
  q, inside, row, carried = reads
  carried = carried + m[..., None, None]
  top = jnp.maximum(row, carried)
  found = product('bkih,bkghv->bkgiv', q, memory, dtype=inside.dtype)
  out = inside * jnp.exp(row - top) + found * jnp.exp(carried - top)
  return _normalize(scale * out, top[..., 0], eps)


def _normalize(out, m, eps):
  """C'^T q / (max(|n' . q|, exp(-m)) + eps), from both products together."""
  out, norm = out[..., :-1], jnp.abs(out[..., -1])
  norm = (jnp.maximum(norm, jnp.exp(-m)) + eps)[..., None]
  # Zero where no key so far has a part along q and exp(-m) underflows.
  empty = norm == 0
  # The derivative of a quotient squares its denominator, which may be as
  # small as exp(-m): a constant factor brings the denominator to 1 before.
  factor = jax.lax.stop_gradient(1 / jnp.where(empty, 1, norm))
  return jnp.where(empty, 0, out * factor / jnp.where(empty, 1, norm * factor))
