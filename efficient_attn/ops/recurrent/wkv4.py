"""The time mixing of RWKV-4 (Peng et al. 2305.13048).

A softmax over the past of every channel, with weights that decay by w <= 0
per token and a bonus u for the current one:

  o_t = (a_{t-1} + exp(u + k_t) v_t) / (b_{t-1} + exp(u + k_t))
  a_t = exp(w) a_{t-1} + exp(k_t) v_t,     b_t = exp(w) b_{t-1} + exp(k_t)

exp(k) overflows, so both are kept relative to exp(m_t), with the running
maximum m_t = max(m_{t-1} + w, k_t). It needs no gradient, and in a chunk it is
a scan of its own (max-plus is associative); given m, what is left is that of
`diagonal_scan` with the log decay m_{t-1} + w - m_t <= 0. O(T H) work, a state
of three numbers per channel.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, shapes
from efficient_attn.ops.recurrent import diagonal_kernels, wkv4_kernels
from efficient_attn.ops.recurrent.diagonal_scan import (
  associative,
  check_form,
  in_sequence,
  kept,
  starts,
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
  implementation: str | Sequence[str] | None = None,
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
    implementation: see `linear_attention`; for the kernel see `wkv4_kernels`.

  Returns:
    out: [B, T, N, H] in the dtype of v.
    state: (num, den, max), each [B, N, H], float32 (float64 for float64
      inputs): a = num exp(max) and b = den exp(max). Where den is 0 the state
      is empty, whatever max is. Gradients take max for a constant.
  """
  check_form(form, dispatch.XLA, 'wkv4')
  _check(k, v, log_decay, bonus, initial_state, segment_ids)
  dtype = shapes.accumulator(k, v, log_decay, bonus, initial_state)
  w, u = (z.astype(dtype) for z in (log_decay, bonus))
  batch, _, *channels = k.shape
  num, den, top = (jnp.zeros((batch, *channels), dtype),) * 3
  if initial_state is not None:
    num, den, top = (z.astype(dtype) for z in initial_state)
  anchor = jnp.where(den > 0, jax.lax.stop_gradient(top), -jnp.inf)
  scale = jnp.exp(top - jax.lax.stop_gradient(top))  # 1, with a gradient
  out, (num, den, top) = wkv4_kernels.recur(
    _step,
    in_sequence(_step, _chunk, form),
    (k, v, jnp.ones((1, k.shape[1], 1, 1), dtype), starts(segment_ids)),
    (num * scale, den * scale, anchor),
    (w, u),
    form=form,
    chunk_size=chunk_size,
    implementation=implementation,
  )
  return out, (num, den, jax.lax.stop_gradient(top))


def explain_wkv4(
  k: Float[shapes.Shaped, 'B T N H'],
  v: Float[shapes.Shaped, 'B T N H'],
  *,
  log_decay: Float[shapes.Shaped, 'N H'],
  bonus: Float[shapes.Shaped, 'N H'],
  initial_state: Any = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation each platform takes, and why not another.

  Takes arguments of `wkv4`; shapes are enough.
  """
  return dispatch.explain(
    wkv4_kernels.KERNELS,
    implementation,
    op=wkv4_kernels.NAME,
    **diagonal_kernels.request(
      k,
      dtype=shapes.accumulator(k, v, log_decay, bonus, initial_state),
      form=form,
      chunk_size=chunk_size,
    ),
  )


def _step(carry, token):
  """One token: k, v [B, N, H], present and start [B, 1, 1], that or None."""
  (*sums, top), (w, u) = carry
  *token, present, start = token
  k, v, gate = _present(token, w, present)
  before, after = _maxima(top, jax.lax.stop_gradient((gate, k)), start)
  decay, written = _written(k, v, gate, before, after)
  out = _read(sums, k, v, u, before)
  sums = [kept(decay, s) + x for s, x in zip(sums, written, strict=True)]
  return ((*sums, after), (w, u)), out.astype(token[1].dtype)


def _present(token, w, present):
  """(k, v, w); what fills up a chunk has no weight, and decays nothing."""
  k, v = (x.astype(w.dtype) for x in token)
  return jnp.where(present > 0, k, -jnp.inf), v, jnp.where(present > 0, w, 0)


def _maxima(top, gates, start):
  """The maximum before a token (-inf where there is no past) and with it."""
  w, k = gates
  before = jax.lax.stop_gradient(top)
  if start is not None:
    before = jnp.where(start > 0, -jnp.inf, before)
  return before, jnp.maximum(_moved(before, w), k)


def _chunk(carry, tokens):
  """C tokens [B, N, C, H]; segments are among the tokens."""
  (*sums, top), (w, u) = carry
  *token, present, start = tokens
  k, v, gate = _present(token, w[:, None], present)
  gates = jax.lax.stop_gradient((gate, k))
  before, after = _all_maxima(jax.lax.stop_gradient(top), gates, start)
  decay, written = _written(k, v, gate, before, after)
  found = [associative(decay, x, s) for x, s in zip(written, sums, strict=True)]
  past = [
    jnp.concatenate([s[:, :, None], x[:, :, :-1]], 2)
    for x, s in zip(found, sums, strict=True)
  ]
  out = _read(past, k, v, u[:, None], before)
  last = (*(x[:, :, -1] for x in found), after[:, :, -1])
  return (last, (w, u)), out.astype(token[1].dtype)


def _all_maxima(top, gates, start):
  """`_maxima` of C tokens."""
  w, k = gates
  w = jnp.broadcast_to(w, k.shape)
  if start is not None:
    w = jnp.where(start > 0, -jnp.inf, w)

  def then(first, second):
    highest = jnp.maximum(_moved(first[1], second[0]), second[1])
    return first[0] + second[0], highest

  total, after = jax.lax.associative_scan(then, (w, k), axis=2)
  after = jnp.maximum(after, _moved(top[:, :, None], total))
  before = jnp.concatenate([top[:, :, None], after[:, :, :-1]], 2)
  if start is not None:
    before = jnp.where(start > 0, -jnp.inf, before)
  return before, after


def _written(k, v, w, before, after):
  """The decay of both sums, and what is added to them."""
  here = jnp.exp(k - after)
  return jnp.exp(before + w - after), (here * v, here)


def _read(sums, k, v, u, before):
  """Returns what a token reads of the sums before it and of itself."""
  shift = jax.lax.stop_gradient(jnp.maximum(before, u + k))
  old, own = jnp.exp(_moved(-shift, before)), jnp.exp(u + k - shift)
  num, den = (kept(old, x) for x in sums)
  return (num + own * v) / (den + own)


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
