"""Additive linear attention and short convolution, token by token, float64.

Plain loops over numpy arrays, written from the equations.
"""

import numpy as np


def linear_attention(
  q,
  k,
  v,
  *,
  log_decay=None,
  bonus=None,
  normalize=False,
  scale=None,
  initial_state=None,
  segment_ids=None,
  read='inclusive',
  bidirectional=False,
):
  """Returns (out, state) as `ops.linear_attention` documents them."""
  if bidirectional:
    return _bidirectional(
      q,
      k,
      v,
      log_decay=log_decay,
      bonus=bonus,
      normalize=normalize,
      scale=scale,
      segment_ids=segment_ids,
      read=read,
    )
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  batch, length, kv_heads, channels = k.shape
  heads = v.shape[2]
  scale = channels**-0.5 if scale is None else scale
  memory = np.zeros((batch, heads, channels, v.shape[3]))
  z = np.zeros((batch, heads, channels))
  if initial_state is not None and normalize:
    memory, z = (np.array(x, np.float64) for x in initial_state)
  elif initial_state is not None:
    memory = np.array(initial_state, np.float64)
  out = np.zeros(v.shape)
  for b in range(batch):
    for n in range(heads):
      head = n // (heads // kv_heads)
      s, norm = memory[b, n], z[b, n]
      for t in range(length):
        if (
          t > 0
          and segment_ids is not None
          and segment_ids[b, t] != segment_ids[b, t - 1]
        ):
          s, norm = np.zeros_like(s), np.zeros_like(norm)
        query, key, value = q[b, t, head], k[b, t, head], v[b, t, n]
        alpha = np.exp(gate_at(log_decay, b, t, n, channels))
        s_before, norm_before = s, norm
        s = alpha[:, None] * s + np.outer(key, value)
        norm = alpha * norm + key
        if read == 'inclusive':
          numerator, denominator = s.T @ query, norm @ query
        else:
          numerator, denominator = s_before.T @ query, norm_before @ query
        if bonus is not None:
          own = query @ (np.asarray(bonus, np.float64)[n] * key)
          numerator, denominator = numerator + own * value, denominator + own
        if normalize and denominator == 0:
          out[b, t, n] = 0
        elif normalize:
          out[b, t, n] = numerator / denominator
        else:
          out[b, t, n] = scale * numerator
      memory[b, n], z[b, n] = s, norm
  return out, (memory, z) if normalize else memory


def gate_at(log_decay, b, t, n, channels):
  """The log decay of a token and head, one number per channel."""
  if log_decay is None:
    return np.zeros(channels)
  log_decay = np.asarray(log_decay, np.float64)
  if log_decay.ndim == 1:
    return np.full(channels, log_decay[n])
  if log_decay.ndim == 3:
    return np.full(channels, log_decay[b, t, n])
  return log_decay[b, t, n]


def _bidirectional(
  q, k, v, *, log_decay, bonus, normalize, scale, segment_ids, read
):
  """Pair by pair: token i reads token j when no boundary is between them."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  batch, length, kv_heads, channels = k.shape
  heads = v.shape[2]
  scale = channels**-0.5 if scale is None else scale
  out = np.zeros(v.shape)
  for b in range(batch):
    ids = np.zeros(length) if segment_ids is None else segment_ids[b]
    for n in range(heads):
      head = n // (heads // kv_heads)
      for i in range(length):
        weights = np.zeros(length)
        for j in range(length):
          low, high = min(i, j), max(i, j)
          if any(ids[m] != ids[m + 1] for m in range(low, high)):
            continue
          if i == j:
            weight = np.ones(channels)
            if read == 'exclusive':
              weight = np.zeros(channels)
            if bonus is not None:
              weight = np.asarray(bonus, np.float64)[n]
          else:
            if read == 'exclusive':
              between = range(low + 1, high)
            elif j < i:
              between = range(j + 1, i + 1)
            else:
              between = range(i, j)
            total = np.zeros(channels)
            for m in between:
              total = total + gate_at(log_decay, b, m, n, channels)
            weight = np.exp(total)
          weights[j] = np.sum(q[b, i, head] * k[b, j, head] * weight)
        row = weights @ v[b, :, n]
        if normalize:
          norm = np.sum(weights)
          out[b, i, n] = 0 if norm == 0 else row / norm
        else:
          out[b, i, n] = scale * row
  return out, None


def short_conv(x, weight, *, bias=None, initial_state=None, segment_ids=None):
  """Returns (y, state) as `ops.short_conv` documents them."""
  x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
  batch, length, width = x.shape
  taps = weight.shape[0]
  out = np.zeros(x.shape)
  state = np.zeros((batch, taps - 1, width))
  for b in range(batch):
    window = np.zeros((taps - 1, width))
    if initial_state is not None:
      window = np.array(initial_state[b], np.float64)
    for t in range(length):
      if (
        t > 0
        and segment_ids is not None
        and segment_ids[b, t] != segment_ids[b, t - 1]
      ):
        window = np.zeros_like(window)
      window = np.concatenate([window, x[b, t][None]])
      out[b, t] = np.sum(window * weight, axis=0)
      if bias is not None:
        out[b, t] += np.asarray(bias, np.float64)
      window = window[1:]
    state[b] = window
  return out, state
