"""The delta rule and its normal form, token by token, float64.

Plain loops over numpy arrays, written from the equations.
"""

import numpy as np

from tests.oracles.linear_attention import gate_at


def dplr(
  q,
  k,
  v,
  a,
  b,
  *,
  log_decay=None,
  scale=None,
  initial_state=None,
  segment_ids=None,
  read='inclusive',
  bidirectional=False,
):
  """Returns (out, state) as `ops.dplr` documents them."""

  def transition(bt, t, n, head, state):
    alpha = np.exp(gate_at(log_decay, bt, t, n, q.shape[3]))
    left, right = b[bt, t, head], a[bt, t, head]
    write = np.outer(k[bt, t, head], v[bt, t, n])
    return alpha[:, None] * state + np.outer(left, right @ state) + write

  return _run(
    transition, q, v, scale, initial_state, segment_ids, read, bidirectional
  )


def delta_rule(
  q,
  k,
  v,
  beta,
  *,
  log_decay=None,
  erase=None,
  scale=None,
  initial_state=None,
  segment_ids=None,
  read='inclusive',
  bidirectional=False,
):
  """Returns (out, state) as `ops.delta_rule` documents them."""

  def transition(b, t, n, head, state):
    alpha = np.exp(gate_at(log_decay, b, t, n, q.shape[3]))
    state = alpha[:, None] * state
    key = k[b, t, head]
    eraser = key if erase is None else erase[b, t, n] * key
    return state + beta[b, t, n] * np.outer(key, v[b, t, n] - eraser @ state)

  return _run(
    transition, q, v, scale, initial_state, segment_ids, read, bidirectional
  )


def _run(
  transition, q, v, scale, initial_state, segment_ids, read, bidirectional
):
  batch, length, kv_heads, channels = q.shape
  heads, width = v.shape[2:]
  scale = channels**-0.5 if scale is None else scale
  out = np.zeros((batch, length, heads, width))
  last = np.zeros((batch, heads, channels, width))
  orders = [range(length)]
  if bidirectional:
    orders.append(range(length - 1, -1, -1))
  for b in range(batch):
    for n in range(heads):
      head = n // (heads // kv_heads)
      for order in orders:
        state = np.zeros((channels, width))
        if initial_state is not None:
          state = np.asarray(initial_state[b, n], np.float64)
        before = None
        for t in order:
          if (
            before is not None
            and segment_ids is not None
            and segment_ids[b, t] != segment_ids[b, before]
          ):
            state = np.zeros_like(state)
          after = transition(b, t, n, head, state)
          seen = after if read == 'inclusive' else state
          out[b, t, n] += scale * (q[b, t, head] @ seen)
          state, before = after, t
        last[b, n] = state
  return out, None if bidirectional else last
