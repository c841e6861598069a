"""Elementwise recurrences, token by token in float64, from the equations.

States come back without stabilisers: sums as they are, not relative to an
exponential of their maximum.
"""

import numpy as np


def _f64(*arrays):
  return [None if x is None else np.array(x, np.float64) for x in arrays]


def _starts(segment_ids, b, t):
  return (
    t > 0
    and segment_ids is not None
    and segment_ids[b, t] != segment_ids[b, t - 1]
  )


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def diagonal_scan(
  x,
  *,
  log_decay,
  initial_state=None,
  segment_ids=None,
  bidirectional=False,
):
  """h_t = exp(log_decay_t) h_{t-1} + x_t."""
  x, log_decay, state = _f64(x, log_decay, initial_state)
  batch, length = x.shape[:2]
  gate = np.broadcast_to(log_decay, x.shape)
  out = np.zeros(x.shape)
  if bidirectional:
    for b in range(batch):
      for i in range(length):
        for j in range(length):
          low, high = min(i, j), max(i, j)
          if any(_starts(segment_ids, b, t) for t in range(low + 1, high + 1)):
            continue
          between = range(j + 1, i + 1) if j < i else range(i, j)
          total = sum((gate[b, t] for t in between), np.zeros(x.shape[2:]))
          out[b, i] += np.exp(total) * x[b, j]
    return out, None
  if state is None:
    state = np.zeros((batch, *x.shape[2:]))
  for b in range(batch):
    for t in range(length):
      if _starts(segment_ids, b, t):
        state[b] = 0
      state[b] = np.exp(gate[b, t]) * state[b] + x[b, t]
      out[b, t] = state[b]
  return out, state


def selective_scan(
  x,
  dt,
  A,
  B,
  C,
  D=None,
  *,
  discretization='euler',
  initial_state=None,
  segment_ids=None,
):
  """h_t = exp(dt A) h_{t-1} + w_t B_t x_t, y_t = C_t . h_t + D x_t."""
  x, dt, A, B, C, D, state = _f64(x, dt, A, B, C, D, initial_state)
  batch, length = x.shape[:2]
  if state is None:
    state = np.zeros((batch, *A.shape))
  out = np.zeros(x.shape)
  for b in range(batch):
    for t in range(length):
      if _starts(segment_ids, b, t):
        state[b] = 0
      step = dt[b, t][..., None]
      weight = np.broadcast_to(step, A.shape)
      if discretization == 'zoh':
        safe = np.where(A == 0, 1, A)
        weight = np.where(A == 0, step, np.expm1(step * safe) / safe)
      state[b] = np.exp(step * A) * state[b]
      state[b] += weight * B[b, t] * x[b, t][..., None]
      out[b, t] = state[b] @ C[b, t]
      if D is not None:
        out[b, t] += D * x[b, t]
  return out, state


def wkv4(k, v, *, log_decay, bonus, initial_state=None, segment_ids=None):
  """Returns out and the plain sums (a, b)."""
  k, v, log_decay, bonus = _f64(k, v, log_decay, bonus)
  batch, length = k.shape[:2]
  above = np.zeros((batch, *k.shape[2:]))
  below = np.zeros_like(above)
  if initial_state is not None:
    num, den, top = _f64(*initial_state)
    above, below = num * np.exp(top), den * np.exp(top)
  out = np.zeros(k.shape)
  for b in range(batch):
    for t in range(length):
      if _starts(segment_ids, b, t):
        above[b], below[b] = 0, 0
      own = np.exp(bonus + k[b, t])
      out[b, t] = (above[b] + own * v[b, t]) / (below[b] + own)
      weight = np.exp(k[b, t])
      above[b] = np.exp(log_decay) * above[b] + weight * v[b, t]
      below[b] = np.exp(log_decay) * below[b] + weight
  return out, (above, below)


def slstm(
  z, i, f, o, recurrent, *, bias=None, initial_state=None, segment_ids=None
):
  """Returns h and the state (h, c, n) without stabiliser."""
  z, i, f, o, recurrent, bias = _f64(z, i, f, o, recurrent, bias)
  batch, length, heads, _ = z.shape
  h = np.zeros((batch, *z.shape[2:]))
  c, n = np.zeros_like(h), np.zeros_like(h)
  if initial_state is not None:
    h, c, n, m = _f64(*initial_state)
    c, n = c * np.exp(m), n * np.exp(m)
  out = np.zeros(z.shape)
  for b in range(batch):
    for t in range(length):
      if _starts(segment_ids, b, t):
        h[b], c[b], n[b] = 0, 0, 0
      gates = []
      for g, x in enumerate((z, i, f, o)):
        mixed = [h[b, j] @ recurrent[g, j] for j in range(heads)]
        gate = x[b, t] + np.stack(mixed)
        gates.append(gate if bias is None else gate + bias[g])
      c[b] = sigmoid(gates[2]) * c[b] + np.exp(gates[1]) * np.tanh(gates[0])
      n[b] = sigmoid(gates[2]) * n[b] + np.exp(gates[1])
      h[b] = sigmoid(gates[3]) * c[b] / n[b]
      out[b, t] = h[b]
  return out, (h, c, n)
