"""Definitions in numpy and float64 that the framework's ops are held against.

Loops over tokens, and softmax over whole rows of logits: nothing is shared with
the ops. Arrays are of one sequence, [T, N, ...].
"""

import numpy as np


def softmax_attention(query, key, value, *, causal=False) -> np.ndarray:
  """softmax(q . k / sqrt(H)) v; the queries are the last T of S positions."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  (T, N, H), (S, K, _) = query.shape, key.shape
  out = np.zeros((T, N, value.shape[-1]))
  for n in range(N):
    kv = n // (N // K)
    logits = query[:, n] @ key[:, kv].T / np.sqrt(H)
    if causal:
      logits = np.where(np.tri(T, S, S - T) > 0, logits, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    out[:, n] = weights @ value[:, kv] / weights.sum(1, keepdims=True)
  return out


def recurrence(
  query, key, value, *, decay=None, beta=None, read=None, write=None
) -> np.ndarray:
  """S = A S + b (a^T S') + k v^T, o = S^T q, head by head.

  Args:
    query: [T, N, H].
    key: [T, N, H].
    value: [T, N, V].
    decay: the diagonal of A, broadcast to [T, N, H]; 1 by default.
    beta: [T, N] of the delta rule, S += beta k (v - S^T k)^T once S has
      decayed.
    read: a, [T, N, H], of the state S' before it decays.
    write: b, [T, N, H].

  Returns:
    The outputs [T, N, V].
  """
  T, N, H = query.shape
  decay = np.broadcast_to(1.0 if decay is None else decay, (T, N, H))
  out = np.zeros(value.shape)
  for n in range(N):
    state = np.zeros((H, value.shape[-1]))
    for t in range(T):
      q, k, v = (np.asarray(x[t, n], np.float64) for x in (query, key, value))
      before, state = state, decay[t, n][:, None] * state
      if read is not None:
        state = state + np.outer(write[t, n], read[t, n] @ before)
      if beta is not None:
        v = beta[t, n] * (v - k @ state)
      state = state + np.outer(k, v)
      out[t, n] = q @ state
  return out


def descent(query, key, value, rate, *, chunk=1) -> np.ndarray:
  """A linear model that starts at zero and descends |S^T k - v|^2 / 2.

  Every token's gradient is that of the weights before its mini-batch of `chunk`
  tokens; each query is read after its own token. Rates are [T, N].
  """
  out = np.zeros(value.shape)
  for n in range(query.shape[1]):
    state = np.zeros((query.shape[-1], value.shape[-1]))
    for t in range(len(query)):
      base = state if t % chunk == 0 else base
      k, v = key[t, n], value[t, n]
      state = state - rate[t, n] * np.outer(k, k @ base - v)
      out[t, n] = query[t, n] @ state
  return out
