"""The Mesa layer, one regularised least-squares fit per token in float64."""

import numpy as np


def mesa(
  q,
  k,
  v,
  *,
  log_decay,
  beta,
  ridge,
  initial_state=None,
  segment_ids=None,
):
  """Returns (out, (A, S)) as `ops.mesa_recurrence` documents them."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, K, H = q.shape
  N, V = v.shape[2:]
  out = np.zeros(v.shape)
  fits, memories = np.zeros((B, N, H, H)), np.zeros((B, N, H, V))
  if initial_state is not None:
    fits, memories = (np.array(x, np.float64) for x in initial_state)
  for b in range(B):
    for n in range(N):
      fit, memory = fits[b, n], memories[b, n]
      head = n // (N // K)
      for t in range(T):
        if (
          t > 0
          and segment_ids is not None
          and segment_ids[b, t] != segment_ids[b, t - 1]
        ):
          fit, memory = np.zeros((H, H)), np.zeros((H, V))
        alpha = np.exp(np.float64(log_decay[b, t, n]))
        key = k[b, t, head]
        fit = alpha * fit + beta[b, t, n] * np.outer(key, key)
        memory = alpha * memory + beta[b, t, n] * np.outer(key, v[b, t, n])
        system = fit + np.diag(np.float64(ridge[n]))
        out[b, t, n] = memory.T @ np.linalg.solve(system, q[b, t, head])
      fits[b, n], memories[b, n] = fit, memory
  return out, (fits, memories)
