"""Log-linear attention by its definition, pair by pair in float64."""

import numpy as np


def levels(t):
  """The level of every token s <= t: which bucket of [0, t) holds it."""
  found = [0] * (t + 1)  # the token itself is level 0
  end = t
  while end > 0:
    size = 1
    while end % (2 * size) == 0:  # the largest power of two that divides
      size *= 2
    for s in range(end - size, end):
      found[s] = int(np.log2(size)) + 1
    end -= size
  return found


def log_linear_attention(
  q, k, v, *, log_decay, level_scales, scale=None, segment_ids=None
):
  """Returns (out, (buckets, count)) as `ops.log_linear_attention` does."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  log_decay = np.asarray(log_decay, np.float64)
  B, T, K, H = q.shape
  N, V = v.shape[2:]
  L = level_scales.shape[-1]
  scale = H**-0.5 if scale is None else scale
  out = np.zeros(v.shape)
  memory = np.zeros((B, N, L - 1, H, V))
  count = np.zeros(B, np.int32)
  for b in range(B):
    start = 0
    for t in range(T):
      if (
        t > 0
        and segment_ids is not None
        and segment_ids[b, t] != segment_ids[b, t - 1]
      ):
        start = t
      found = levels(t - start)
      for n in range(N):
        for s in range(start, t + 1):
          level = min(found[s - start], L - 1)
          decay = np.exp(np.sum(log_decay[b, s + 1 : t + 1, n]))
          head = n // (N // K)
          weight = level_scales[b, t, n, level] * decay
          dot = q[b, t, head] @ k[b, s, head]
          out[b, t, n] += scale * weight * dot * v[b, s, n]
    count[b] = T - start
    found = levels(T - start)
    for n in range(N):
      for s in range(start, T):
        bucket = min(found[s - start], L - 1) - 1
        decay = np.exp(np.sum(log_decay[b, s + 1 :, n]))
        pair = np.outer(k[b, s, n // (N // K)], v[b, s, n])
        memory[b, n, bucket] += decay * pair
  return out, (memory, count)
