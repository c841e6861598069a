"""Fast weights token by token, float64 loops written from the equations."""

import numpy as np


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
  tanh = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
  inner = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
  return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner


def silu(x):
  return x / (1 + np.exp(-x))


def silu_slope(x):
  sigmoid = 1 / (1 + np.exp(-x))
  return sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS = {'gelu': (gelu, gelu_slope), 'silu': (silu, silu_slope)}


def model(layers, norm, activation, x):
  """f(x) and what its derivative needs, for one token."""
  inputs, y = [], x
  for i, (weight, bias) in enumerate(layers):
    if i:
      y = ACTIVATIONS[activation][0](y)
    inputs.append(y)
    y = y @ weight + (0 if bias is None else bias)
  z = y
  if norm is not None:
    deviation = np.sqrt(np.var(z) + 1e-6)
    y = x + (z - z.mean()) / deviation * norm[0] + norm[1]
  return y, inputs, z


def gradient(layers, norm, activation, k, v):
  """d |f(k) - v|^2 / 2 by hand, a list of (weight, bias)."""
  answer, inputs, z = model(layers, norm, activation, k)
  error = answer - v
  if norm is not None:
    deviation = np.sqrt(np.var(z) + 1e-6)
    unit = (z - z.mean()) / deviation
    error = error * norm[0]
    error = (error - error.mean() - unit * np.mean(error * unit)) / deviation
  found = []
  for i in range(len(layers) - 1, -1, -1):
    found.append((np.outer(inputs[i], error), error))
    if i:
      weight, bias = layers[i - 1]
      before = inputs[i - 1] @ weight + (0 if bias is None else bias)
      error = layers[i][0] @ error * ACTIVATIONS[activation][1](before)
  return found[::-1]


def fast_weights(
  q,
  k,
  v,
  learning_rate,
  *,
  weights,
  norm=None,
  shares=None,
  log_decay=None,
  log_momentum=None,
  activation='gelu',
  initial_state=None,
  segment_ids=None,
  bidirectional=False,
  chunk_size=16,
):
  """Returns (out, (base, weights, momentum, count)) as the op documents."""
  if bidirectional:
    inputs = dict(
      q=q,
      k=k,
      v=v,
      learning_rate=learning_rate,
      log_decay=log_decay,
      log_momentum=log_momentum,
      segment_ids=segment_ids,
    )
    total = 0
    for step in (1, -1):
      turned = {
        n: None if x is None else x[:, ::step] for n, x in inputs.items()
      }
      out, _ = fast_weights(
        **turned,
        weights=weights,
        norm=norm,
        shares=shares,
        activation=activation,
        chunk_size=chunk_size,
      )
      total = total + out[:, ::step]
    return total, None
  batch, length, heads, _ = q.shape
  out = np.zeros(v.shape)
  states = []
  for b in range(batch):
    for n in range(heads):
      first = _pick(weights, n)
      base, now, past, count = first, first, _scaled(first, 0.0), 0
      if initial_state is not None:
        base, now, past = (
          None if part is None else _pick(part, b, n)
          for part in initial_state[:3]
        )
        past = _scaled(first, 0.0) if past is None else past
        count = int(initial_state[3][b])
      head_norm = None if norm is None else (norm[0][n], norm[1][n])
      for t in range(length):
        if (
          t > 0
          and segment_ids is not None
          and segment_ids[b, t] != segment_ids[b, t - 1]
        ):
          base, now, past, count = first, first, _scaled(first, 0.0), 0
        if count == chunk_size and shares is not None:
          now = _between(base, now, shares[-1])
        if count in (0, chunk_size):
          base, count = now, 0
        count += 1
        g = gradient(base, head_norm, activation, k[b, t, n], v[b, t, n])
        held = 0 if log_momentum is None else np.exp(log_momentum[b, t, n])
        decay = 1 if log_decay is None else np.exp(log_decay[b, t, n])
        past = _sum(_scaled(past, held), g, -learning_rate[b, t, n])
        now = _sum(_scaled(now, decay), past, 1.0)
        read = now
        if shares is not None:
          read = _between(base, now, shares[count - 1])
        out[b, t, n] = model(read, head_norm, activation, q[b, t, n])[0]
      moving = None if log_momentum is None else past
      states.append((base, now, moving, count))
  counts = np.array([s[3] for s in states]).reshape(batch, heads)[:, 0]
  parts = [_stack([s[i] for s in states], batch, heads) for i in range(3)]
  return out, (*parts, counts)


def lact(
  q,
  k,
  v,
  learning_rate,
  *,
  weights,
  momentum=None,
  use_muon=True,
  muon_steps=None,
  initial_state=None,
  segment_ids=None,
  bidirectional=False,
  chunk_size=16,
):
  """Returns (out, (weights, gradient, velocity, momentum, count))."""
  batch, length, heads, _ = q.shape
  out = np.zeros(v.shape)
  states = []
  for b in range(batch):
    for n in range(heads):
      first = [w[n] for w in weights]
      norms = [np.linalg.norm(w, axis=0) for w in first]
      zeros = [np.zeros_like(w) for w in first]
      w, g, m, share, count = first, zeros, zeros, 0.0, 0
      if initial_state is not None:
        w, g, m = (
          zeros if part is None else [x[b, n] for x in part]
          for part in initial_state[:3]
        )
        if momentum is not None:
          share = initial_state[3][b, n]
        count = int(initial_state[4][b])

      def update(w, g, m, share, count, norms=norms):
        step = [share / count * x + y for x, y in zip(m, g, strict=True)]
        change = step
        if use_muon:
          change = [newton_schulz(x, muon_steps or TUNED) for x in step]
        moved = [x + y for x, y in zip(w, change, strict=True)]
        moved = [
          x / np.linalg.norm(x, axis=0) * norm
          for x, norm in zip(moved, norms, strict=True)
        ]
        return moved, step

      for t in range(length):
        if (
          t > 0
          and segment_ids is not None
          and segment_ids[b, t] != segment_ids[b, t - 1]
        ):
          w, g, m, share, count = first, zeros, zeros, 0.0, 0
        if count == chunk_size and not bidirectional:
          w, m = update(w, g, m, share, count)
          g, share, count = zeros, 0.0, 0
        count += 1
        x, value = k[b, t, n], v[b, t, n]
        one, three = x @ w[0], x @ w[2]
        error = w[1] @ value
        rate = learning_rate[b, t, n]
        per_token = (
          np.outer(x, error * three * silu_slope(one)),
          np.outer(silu(one) * three, value),
          np.outer(x, error * silu(one)),
        )
        g = [a + r * d for a, r, d in zip(g, rate, per_token, strict=True)]
        if momentum is not None:
          share = share + momentum[b, t, n]
        x = q[b, t, n]
        out[b, t, n] = (silu(x @ w[0]) * (x @ w[2])) @ w[1]
      if bidirectional:
        w, _ = update(w, g, m, share, count)
        x = q[b, :, n]
        out[b, :, n] = (silu(x @ w[0]) * (x @ w[2])) @ w[1]
      states.append((w, g, m, share, count))
  if bidirectional:
    return out, None
  parts = [
    tuple(
      np.stack([s[i][j] for s in states]).reshape(
        batch, heads, *weights[j].shape[1:]
      )
      for j in range(3)
    )
    for i in range(3)
  ]
  shares = np.array([s[3] for s in states]).reshape(batch, heads)
  counts = np.array([s[4] for s in states]).reshape(batch, heads)[:, 0]
  if momentum is None:
    return out, (*parts[:2], None, None, counts)
  return out, (*parts, shares, counts)


JORDAN = np.tile([3.4445, -4.7750, 2.0315], (5, 1)).tolist()
# Of the released code of LaCT, lact_llm/lact_model/ttt_operation.py.
TUNED = [
  [4.0848, -6.8946, 2.9270],
  [3.9505, -6.3029, 2.6377],
  [3.7418, -5.5913, 2.3037],
  [2.8769, -3.1427, 1.2046],
  [2.8366, -3.0525, 1.2012],
]


def newton_schulz(g, steps):
  """On the singular values: odd polynomials act on each of them alone."""
  u, s, vt = np.linalg.svd(g, full_matrices=False)
  s = s / np.sqrt(np.sum(s**2))
  for a, b, c in steps:
    s = a * s + b * s**3 + c * s**5
  return u @ np.diag(s) @ vt


def _pick(layers, *index):
  return [
    (weight[index], None if bias is None else bias[index])
    for weight, bias in layers
  ]


def _scaled(layers, factor):
  return [
    (factor * weight, None if bias is None else factor * bias)
    for weight, bias in layers
  ]


def _between(layers, others, share):
  """The first, moved by a share of the way to the others."""
  return _sum(_scaled(layers, 1 - share), others, share)


def _sum(layers, others, factor):
  return [
    (w + factor * dw, None if b is None else b + factor * db)
    for (w, b), (dw, db) in zip(layers, others, strict=True)
  ]


def _stack(rows, batch, heads):
  if rows[0] is None:
    return None

  def stack(arrays):
    if arrays[0] is None:
      return None
    return np.stack(arrays).reshape(batch, heads, *arrays[0].shape)

  return tuple(
    (stack([r[i][0] for r in rows]), stack([r[i][1] for r in rows]))
    for i in range(len(rows[0]))
  )
