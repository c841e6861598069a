"""PaTH attention, token by token in float64: every token turns all keys."""

import numpy as np


def path_attention(
  q, k, v, w, beta, *, log_forget=None, scale=None, segment_ids=None, past=None
):
  """Returns (out, keys, forget): the turned keys and their biases at the end.

  `past` is (keys, values, forget) of the tokens before.
  """
  q, k, v, w, beta = (np.asarray(x, np.float64) for x in (q, k, v, w, beta))
  B, T, N, H = q.shape
  scale = H**-0.5 if scale is None else scale
  start = 0 if past is None else past[0].shape[1]
  keys = np.zeros((B, start + T, N, H))
  values = np.zeros((B, start + T, N, v.shape[-1]))
  forget = np.zeros((B, start + T, N))
  if past is not None:
    keys[:, :start], values[:, :start], forget[:, :start] = past
  keys[:, start:], values[:, start:] = k, v
  out = np.zeros(v.shape)
  for b in range(B):
    for n in range(N):
      first = 0
      for t in range(T):
        if (
          t > 0
          and segment_ids is not None
          and segment_ids[b, t] != segment_ids[b, t - 1]
        ):
          first = start + t
        direction = w[b, t, n]
        for s in range(start + t):
          along = direction @ keys[b, s, n]
          keys[b, s, n] = keys[b, s, n] - beta[b, t, n] * along * direction
          if log_forget is not None:
            forget[b, s, n] += log_forget[b, t, n]
        seen = range(first, start + t + 1)
        logits = np.array(
          [scale * q[b, t, n] @ keys[b, s, n] + forget[b, s, n] for s in seen]
        )
        weights = np.exp(logits - logits.max())
        weights = weights / weights.sum()
        out[b, t, n] = weights @ values[b, first : start + t + 1, n]
  return out, keys, forget
