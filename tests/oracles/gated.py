"""mLSTM, slot attention and the trapezoidal scan, token by token, float64.

Plain loops over numpy arrays, written from the equations.
"""

import numpy as np


def _starts(segment_ids, b, t):
  return (
    t > 0
    and segment_ids is not None
    and segment_ids[b, t] != segment_ids[b, t - 1]
  )


def mlstm(
  q,
  k,
  v,
  input_gate,
  log_forget,
  *,
  scale=None,
  eps=0.0,
  initial_state=None,
  segment_ids=None,
):
  """Returns (out, state) as `ops.mlstm` documents them.

  The memory is that of the paper, without a stabiliser: exp(i) must be finite.
  """
  batch, length, kv_heads, channels = k.shape
  heads = v.shape[2]
  scale = channels**-0.5 if scale is None else scale
  out = np.zeros(v.shape)
  c_out = np.zeros((batch, heads, channels, v.shape[3]))
  n_out = np.zeros((batch, heads, channels))
  m_out = np.zeros((batch, heads))
  for b in range(batch):
    for h in range(heads):
      head = h // (heads // kv_heads)
      c, n, m = c_out[b, h], n_out[b, h], 0.0
      if initial_state is not None:
        m = initial_state[2][b, h]
        c = initial_state[0][b, h] * np.exp(m)
        n = initial_state[1][b, h] * np.exp(m)
      for t in range(length):
        if _starts(segment_ids, b, t):
          c, n, m = np.zeros_like(c), np.zeros_like(n), 0.0
        forget, write = log_forget[b, t, h], input_gate[b, t, h]
        key = k[b, t, head]
        c = np.exp(forget) * c + np.exp(write) * np.outer(key, v[b, t, h])
        n = np.exp(forget) * n + np.exp(write) * key
        m = max(forget + m, write, 0.0)
        query = scale * q[b, t, head]
        norm = max(abs(n @ query), 1.0) + eps * np.exp(m)
        out[b, t, h] = c.T @ query / norm
      c_out[b, h], n_out[b, h], m_out[b, h] = c * np.exp(-m), n * np.exp(-m), m
  return out, (c_out, n_out, m_out)


def gated_slot_attention(
  q, k, v, log_decay, *, scale=None, initial_state=None, segment_ids=None
):
  """Returns (out, state) as `ops.gated_slot_attention` documents them."""
  batch, length, heads, channels = k.shape
  slots = log_decay.shape[-1]
  scale = channels**-0.5 if scale is None else scale
  out = np.zeros(v.shape)
  keys = np.zeros((batch, heads, slots, channels))
  values = np.zeros((batch, heads, slots, v.shape[3]))
  if initial_state is not None:
    keys, values = (np.array(x) for x in initial_state)
  for b in range(batch):
    for h in range(heads):
      for t in range(length):
        if _starts(segment_ids, b, t):
          keys[b, h], values[b, h] = 0, 0
        alpha = np.exp(log_decay[b, t, h])[:, None]
        keys[b, h] = alpha * keys[b, h] + (1 - alpha) * k[b, t, h]
        values[b, h] = alpha * values[b, h] + (1 - alpha) * v[b, t, h]
        logits = scale * keys[b, h] @ q[b, t, h]
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ values[b, h]
  return out, (keys, values)


def trapezoidal_scan(
  q,
  k,
  v,
  log_decay,
  dt,
  right,
  angles,
  *,
  initial_state=None,
  segment_ids=None,
):
  """Returns (out, state) as `ops.trapezoidal_scan` documents them.

  The loop is the recurrence of the paper over h, with complex rotations.
  """
  batch, length, heads, channels = k.shape
  pairs = angles.shape[-1]
  out = np.zeros(v.shape)
  state = (
    np.zeros((batch, heads, channels, v.shape[3])),
    np.zeros((batch, heads, channels)),
    np.zeros((batch, heads, v.shape[3])),
    np.zeros((batch, heads)),
    np.zeros((batch, heads, pairs)),
  )
  if initial_state is not None:
    state = tuple(np.array(x) for x in initial_state)

  def rotate(x, angle):
    z = (x[:pairs] + 1j * x[pairs : 2 * pairs]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag, x[2 * pairs :]])

  for b in range(batch):
    for n in range(heads):
      s, key, value, own, angle = (x[b, n] for x in state)
      h = s + own * np.outer(key, value)
      for t in range(length):
        if _starts(segment_ids, b, t):
          h, key, angle = np.zeros_like(h), np.zeros_like(key), 0 * angle
        alpha = np.exp(log_decay[b, t, n])
        step, weight = dt[b, t, n], right[b, t, n]
        angle = angle + angles[b, t, n]
        before = np.outer(key, value)
        key, value = rotate(k[b, t, n], angle), v[b, t, n]
        own = weight * step
        h = (
          alpha * h
          + (1 - weight) * step * alpha * before
          + own * np.outer(key, value)
        )
        out[b, t, n] = h.T @ rotate(q[b, t, n], angle)
      s = h - own * np.outer(key, value)
      last = s, key, value, own, angle % (2 * np.pi)
      for x, y in zip(state, last, strict=True):
        x[b, n] = y
  return out, state
