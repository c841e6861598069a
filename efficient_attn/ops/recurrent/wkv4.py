"""The time mixing of RWKV-4 (Peng et al. 2305.13048).

A softmax over the past of every channel, with weights that decay by w <= 0
per token and a bonus u for the current one:

  o_t = (a_{t-1} + exp(u + k_t) v_t) / (b_{t-1} + exp(u + k_t))
  a_t = exp(w) a_{t-1} + exp(k_t) v_t,     b_t = exp(w) b_{t-1} + exp(k_t)

exp(k) overflows, so both are kept relative to exp(m_t), with the running
maximum m_t = max(m_{t-1} + w, k_t). It needs no gradient, and it is a scan of
its own (max-plus is associative); given m, what is left is a `diagonal_scan`
with the log decay m_{t-1} + w - m_t <= 0. O(T H) work, a state of three
numbers per channel.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.recurrent.diagonal_scan import (
  check_form,
  chunk,
  kept,
  recur,
  starts,
  step,
)


def wkv4(
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N H'],
  *,
  log_decay: Float[Array, 'N H'],
  bonus: Float[Array, 'N H'],
  initial_state: tuple[Array, Array, Array] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N H'], tuple[Array, Array, Array]]:
  """The equations of the module docstring, for every head and channel.

  Args:
    k: logarithms of the weights; any finite size.
    v: values.
    log_decay: w <= 0, -exp(.) in the paper.
    bonus: u.
    initial_state: what a call returned; part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'chunkwise', 'recurrent' or None, as in `diagonal_scan`.
    chunk_size: tokens per chunk, a power of two.
    implementation: None or 'xla'.

  Returns:
    out: [B, T, N, H] in the dtype of v.
    state: (num, den, max), each [B, N, H], float32 (float64 for float64
      inputs): a = num exp(max) and b = den exp(max). Where den is 0 the state
      is empty, whatever max is. Gradients take max for a constant.
  """
  check_form(form, implementation, 'wkv4')
  _check(k, v, log_decay, bonus, initial_state, segment_ids)
  dtype = shapes.accumulator(k, v, log_decay, bonus, initial_state)
  k, value, w, u = (z.astype(dtype) for z in (k, v, log_decay, bonus))
  batch, _, *channels = k.shape
  state = (jnp.zeros((batch, *channels), dtype),) * 3
  if initial_state is not None:
    state = tuple(z.astype(dtype) for z in initial_state)
  num, den, top = state
  anchor = jnp.where(den > 0, jax.lax.stop_gradient(top), -jnp.inf)
  start = starts(segment_ids)
  options = dict(form=form, chunk_size=chunk_size)
  before, after = jax.lax.stop_gradient(
    _running_max(jax.lax.stop_gradient((w, k)), anchor, start, **options)
  )

  # Numerator and denominator are channels of one scan.
  here = jnp.exp(k - after)
  sums = jnp.concatenate([here * value, here], -1)
  gate = jnp.tile(before + w - after, 2)
  scale = jnp.exp(top - jax.lax.stop_gradient(top))  # 1, with a gradient
  first = jnp.concatenate([num * scale, den * scale], -1)
  sums, last = recur(step, chunk, (sums, gate, start), first, **options)

  past = jnp.concatenate([first[:, None], sums[:, :-1]], 1)
  past_num, past_den = jnp.split(past, 2, -1)
  shift = jax.lax.stop_gradient(jnp.maximum(before, u + k))
  old, own = jnp.exp(_moved(-shift, before)), jnp.exp(u + k - shift)
  num, den = kept(old, past_num), kept(old, past_den)
  out = (num + own * value) / (den + own)
  return out.astype(v.dtype), (*jnp.split(last, 2, -1), after[:, -1])


def _running_max(inputs, anchor, start, **options):
  """m_{t-1} (-inf where there is no past) and m_t, [B, T, N, H]."""
  w, k = inputs
  w = jnp.broadcast_to(w, (1, *k.shape[1:]))
  if start is not None:
    w = jnp.where(start > 0, -jnp.inf, w)
  after, _ = recur(_max_step, _max_chunk, (w, k), anchor, **options)
  before = jnp.concatenate([anchor[:, None], after[:, :-1]], 1)
  if start is not None:
    before = jnp.where(start > 0, -jnp.inf, before)
  return before, after


def _max_step(top, token):
  w, k = token
  top = jnp.maximum(_moved(top, w), k)
  return top, top


def _max_chunk(top, tokens):
  def then(first, second):
    top = jnp.maximum(_moved(first[1], second[0]), second[1])
    return first[0] + second[0], top

  total, after = jax.lax.associative_scan(then, tokens, axis=2)
  after = jnp.maximum(after, _moved(top[:, :, None], total))
  return after[:, :, -1], after


def _moved(top, w):
  """Adds the gate w to top; one of -inf forgets NaN too."""
  return jnp.where(w == -jnp.inf, w, top + w)


def _check(k, v, log_decay, bonus, initial_state, segment_ids):
  if k.ndim != 4 or k.shape[1] == 0:
    raise ValueError(
      f'k has shape {k.shape}: pass [batch, length >= 1, heads, channels].'
    )
  shapes.check_floating('k', k)
  shapes.check_log_decay(log_decay)
  wanted = {
    'v': (v, k.shape),
    'log_decay': (log_decay, k.shape[2:]),
    'bonus': (bonus, k.shape[2:]),
    'segment_ids': (segment_ids, k.shape[:2]),
  }
  if initial_state is not None:
    for i, part in enumerate(initial_state):
      wanted[f'initial_state[{i}]'] = part, (k.shape[0], *k.shape[2:])
  shapes.check_shapes(wanted)
