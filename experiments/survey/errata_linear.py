"""Equations of linear attention that a survey prints wrong, in both forms.

Each function evaluates a printed equation, the corrected one and our op, all in
float64 unless it says otherwise, and returns the errors of the three against
the recurrence they stand for. Chunks are counted from 0 and hold C tokens; the
recurrence with rank-1 gates is

  S_t = (a_t b_t^T) * S_{t-1} + (c_t * k_t) (e_t * v_t)^T,    o_t = S_t^T q_t.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import (
  delta_rule,
  dplr,
  gated_slot_attention,
  linear_attention,
)
from experiments.errors import largest

T, H, C = 32, 6, 8
LOST = 'not finite'
CHUNKS = dict(scale=1, form='chunkwise', chunk_size=C)


def error(found, wanted) -> float | str:
  """The largest difference, relative to the largest number wanted."""
  if not np.isfinite(found).all():
    return LOST
  return largest(found, wanted)


def ours(op, *arrays, **options) -> np.ndarray:
  """The output of an op for arrays [T, N, ...] of one float64 sequence."""
  with jax.enable_x64(True):
    arrays = [jnp.asarray(x)[None] for x in arrays]
    out, _ = jax.jit(functools.partial(op, **options))(*arrays)
    return np.asarray(out)[0]


@functools.cache
def tokens() -> tuple[np.ndarray, ...]:
  """q, k, v and the gates a, b of the state, c, e of what is written."""
  rng = np.random.default_rng(0)
  kept = rng.uniform(0.8, 1, (2, T, H))
  written = rng.uniform(0.5, 1, (2, T, H))
  return *rng.standard_normal((3, T, H)), *kept, *written


def recurrence(q, k, v, a=None, b=None, c=None, e=None) -> np.ndarray:
  """The definition; gates that are not given are 1."""
  one = np.ones((T, H))
  a, b, c, e = (one if gate is None else gate for gate in (a, b, c, e))
  state, out = np.zeros((H, H)), []
  for t in range(T):
    write = np.outer(c[t] * k[t], e[t] * v[t])
    state = np.outer(a[t], b[t]) * state + write
    out.append(q[t] @ state)
  return np.array(out)


def gated_op(q, k, v, a, b, c, e) -> np.ndarray:
  """`linear_attention` with one head for each channel of the values."""

  def op(q, k, v, log_decay):
    return linear_attention(q, k, v, log_decay=log_decay, **CHUNKS)

  log_decay = np.log(a)[:, None] + np.log(b)[..., None]
  out = ours(op, q[:, None], (c * k)[:, None], (e * v)[..., None], log_decay)
  return out[..., 0]


def chunkwise(q, k, v, a, b, c, e, misprint='') -> np.ndarray:
  """The chunkwise form, with one of its misprints."""

  def shifted(products):
    return np.concatenate([np.ones((1, H)), products[:-1]])

  def later(x):
    return np.array([x[m + 1 :].prod(0) for m in range(C)])

  states, out, before = [np.zeros((H, H))] * 2, [], np.ones((C, H))
  parts = (x.reshape(-1, C, H) for x in (q, k, v, a, b, c, e))
  for q, k, v, a, b, c, e in zip(*parts, strict=True):
    A, B = np.cumprod(a, 0), np.cumprod(b, 0)
    inside = (q * A) @ (c * k / A).T * np.tri(C) @ (e * v / B) * B
    across = (q * A) @ states[-1] * (before if misprint == 'E1' else B)
    out.append(inside + across)
    passed = (shifted(A), shifted(B)) if misprint == 'E2' else (A, B)
    keys, values = A[-1] / passed[0] * c * k, B[-1] / passed[1] * e * v
    if misprint == 'E4':
      keys, values = later(a * c * k), later(b * e * v)
    kept = states[-2] if misprint == 'E3' else states[-1]
    states.append(np.outer(A[-1], B[-1]) * kept + keys.T @ values)
    before = B
  return np.concatenate(out)


@functools.cache
def _gated():
  wanted = recurrence(*tokens())
  good = error(chunkwise(*tokens()), wanted)
  return wanted, good, error(gated_op(*tokens()), wanted)


def chunks(misprint: str) -> tuple:
  """E1 to E4."""
  wanted, *good = _gated()
  return error(chunkwise(*tokens(), misprint=misprint), wanted), *good


def retention() -> tuple:
  """E5: which queries read which state."""
  q, k, v, *_ = tokens()
  gamma = 0.9
  power = np.arange(C)
  inner = np.tril(gamma ** (power[:, None] - power))
  read, write = gamma ** (power[:, None] + 1), gamma ** (C - 1 - power[:, None])

  def chunkwise(lag):
    q_, k_, v_ = (x.reshape(-1, C, H) for x in (q, k, v))
    states, out = [np.zeros((H, H))], []
    for i in range(T // C):
      j = i - lag
      across = q_[j] @ states[j] * read if j >= 0 else 0
      out.append(q_[i] @ k_[i].T * inner @ v_[i] + across)
      states.append(gamma**C * states[i] + k_[i].T @ (v_[i] * write))
    return np.concatenate(out)

  wanted = recurrence(q, k, v, np.full((T, H), gamma))

  def op(q, k, v):
    log_decay = jnp.log(jnp.array([gamma]))
    return linear_attention(q, k, v, log_decay=log_decay, **CHUNKS)

  found = ours(op, *(x[:, None] for x in (q, k, v)))
  results = chunkwise(lag=1), chunkwise(lag=0), found[:, 0]
  return tuple(error(x, wanted) for x in results)


def slots() -> tuple:
  """E6: the axis along which the two passes of slot attention decay."""
  q, k, v, alpha, *_ = tokens()

  def softmax(x):
    return np.exp(x) / np.exp(x).sum()

  def two_passes(printed):
    first, second, out = np.zeros((H, H)), np.zeros((H, H)), []
    for t in range(T):
      gates = alpha[t][None], alpha[t][:, None]
      along, across = gates[::-1] if printed else gates
      first = along * first + np.outer(k[t], 1 - alpha[t])
      second = across * second + np.outer(1 - alpha[t], v[t])
      out.append(softmax(q[t] @ first) @ second)
    return np.array(out)

  keys, values, wanted = np.zeros((H, H)), np.zeros((H, H)), []
  for t in range(T):
    gate = alpha[t][:, None]
    keys = gate * keys + (1 - gate) * k[t]
    values = gate * values + (1 - gate) * v[t]
    wanted.append(softmax(keys @ q[t]) @ values)
  wanted = np.array(wanted)
  arrays = (x[:, None] for x in (q, k, v, np.log(alpha)))
  results = (
    two_passes(True),
    two_passes(False),
    ours(gated_slot_attention, *arrays, **CHUNKS)[:, 0],
  )
  return tuple(error(x, wanted) for x in results)


def unit_keys():
  """q, k, v with keys of length 1, and write strengths."""
  q, k, v, strength, *_ = tokens()
  return q, k / np.linalg.norm(k, axis=1, keepdims=True), v, strength[:, 0]


def transition() -> tuple:
  """E7: the transition of the delta rule, entry by entry or as a matrix."""
  q, k, v, beta = unit_keys()

  def run(times):
    state, out = np.zeros((H, H)), []
    for t in range(T):
      gate = np.eye(H) - beta[t] * np.outer(k[t], k[t])
      state = times(gate, state) + beta[t] * np.outer(k[t], v[t])
      out.append(q[t] @ state)
    return np.array(out)

  state, wanted = np.zeros((H, H)), []
  for t in range(T):  # write what the key does not recall yet
    state += beta[t] * np.outer(k[t], v[t] - k[t] @ state)
    wanted.append(q[t] @ state)
  wanted = np.array(wanted)
  arrays = *(x[:, None] for x in (q, k, v)), beta[:, None]
  found = ours(delta_rule, *arrays, **CHUNKS)[:, 0]
  results = run(np.multiply), run(np.matmul), found
  return tuple(error(x, wanted) for x in results)


def side() -> tuple:
  """E15: the side of the transition of RWKV-7, on a value x key state."""
  q, k, v, *_ = tokens()
  _, *(kappa, _, _) = unit_keys()
  w, strength = tokens()[3:5]

  def run(left):
    state, out = np.zeros((H, H)), []
    for t in range(T):
      gate = np.diag(w[t]) - np.outer(kappa[t], strength[t] * kappa[t])
      state = gate @ state if left else state @ gate
      state = state + np.outer(v[t], k[t])
      out.append(state @ q[t])
    return np.array(out)

  state, wanted = np.zeros((H, H)), []
  for t in range(T):  # key x value: forget what kappa reads, then write
    erased = np.outer(strength[t] * kappa[t], kappa[t] @ state)
    state = w[t][:, None] * state - erased + np.outer(k[t], v[t])
    wanted.append(q[t] @ state)
  arrays = (q, k, v, kappa, -strength * kappa)

  def op(*arrays):
    return dplr(*arrays[:5], log_decay=arrays[5], **CHUNKS)

  found = ours(op, *(x[:, None] for x in (*arrays, np.log(w))))[:, 0]
  results = run(True), run(False), found
  return tuple(error(x, np.array(wanted)) for x in results)


def own_token() -> tuple:
  """E18: whether the state that a token reads holds it."""
  q, k, v, *_ = tokens()
  sums = [
    np.array([q[t] @ k[: t + end].T @ v[: t + end] for t in range(T)])
    for end in (0, 1)
  ]
  found = ours(linear_attention, *(x[:, None] for x in (q, k, v)), **CHUNKS)
  wanted = recurrence(q, k, v)
  return tuple(error(x, wanted) for x in (*sums, found[:, 0]))


def normalisation() -> tuple:
  """E19: sums that are called the same as means."""
  q, k, v, *_ = tokens()
  q, k = np.exp(q), np.exp(k)
  wanted = []
  for t in range(T):
    weights = k[: t + 1] @ q[t]
    wanted.append(weights @ v[: t + 1] / weights.sum())
  scores = q @ k.T * np.tri(T)
  arrays = (x[:, None] for x in (q, k, v))
  found = ours(linear_attention, *arrays, normalize=True)[:, 0]
  results = scores @ v, scores @ v / scores.sum(1, keepdims=True), found
  return tuple(error(x, np.array(wanted)) for x in results)


def mask_of_a_chunk() -> tuple:
  """E20: the causal mask inside a chunk, with the sizes of Fig. 3."""
  q, k, v, *_ = (x[:C] for x in tokens())
  wanted = recurrence(*tokens()[:3])[:C]
  found = ours(linear_attention, *(x[:, None] for x in (q, k, v)), **CHUNKS)
  results = []
  for size in (H, C):
    try:
      results.append(error(q @ k.T * np.tri(size) @ v, wanted))
    except ValueError:
      results.append('shapes do not fit')
  return *results, error(found[:, 0], wanted)


def products_of_gates() -> tuple:
  """E25, in float32: cumulative products, and sums of logarithms."""
  length, width, decay = 1024, 4, 0.9
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, length, width)).astype(np.float32)
  state, wanted = np.zeros((width, width)), []
  for t in range(length):
    state = decay * state + np.outer(k[t], v[t])
    wanted.append(q[t] @ state)
  wanted = np.array(wanted)
  logs = np.full((length, width), np.log(decay), np.float32)
  with np.errstate(all='ignore'):
    product = np.cumprod(np.exp(logs), 0)
    printed = np.tril((q * product) @ (k / product).T) @ v
  total = np.cumsum(logs[:, 0], dtype=np.float32)
  span = np.where(np.tri(length), total[:, None] - total, -np.inf)
  corrected = (q @ k.T * np.exp(span)) @ v
  found, _ = linear_attention(
    *(jnp.asarray(x)[None, :, None] for x in (q, k, v)),
    log_decay=jnp.asarray(logs)[None, :, None],
    scale=1,
  )
  results = printed, corrected, np.asarray(found)[0, :, 0]
  return tuple(error(x, wanted) for x in results)
