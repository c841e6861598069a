"""The forget-gate bias of FoX, one pair at a time in float64."""

import numpy as np


def spans(log_forget, T, offset=0):
  """[B, N, T, S]: the gates of (key, query], zero for a key after the query."""
  log_forget = np.asarray(log_forget, np.float64)
  B, S, N = log_forget.shape
  out = np.zeros((B, N, T, S))
  for b, n, t, s in np.ndindex(B, N, T, S):
    for token in range(s + 1, t + offset + 1):
      out[b, n, t, s] += log_forget[b, token, n]
  return out
