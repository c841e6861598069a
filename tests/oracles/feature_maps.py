"""Kernels and attention by them, dense and in float64, from the equations.

Queries and keys are [B, T, N, H]; kernels return weights [B, N, T, S].
"""

import numpy as np


def dot(q, k):
  """q_t . k_s of every pair of tokens."""
  return np.einsum('btnh,bsnh->bnts', q, k)


def relu(x):
  return np.maximum(x, 0)


def elu_plus_one(x):
  return np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1


def taylor(q, k):
  s = dot(q, k)
  return 1 + s + s**2 / 2


def cosine(q, k, max_length):
  t = np.arange(q.shape[1])
  angle = np.pi / 2 * (t[:, None] - t) / max_length
  return dot(relu(q), relu(k)) * np.cos(angle)


def taylor_diagonal(q, k, alpha, beta, gamma):
  """QT-ViT's compact kernel, channel by channel."""
  total = np.full((q.shape[0], q.shape[2], q.shape[1], k.shape[1]), gamma**2)
  for i in range(q.shape[-1]):
    one = dot(q[..., i : i + 1], k[..., i : i + 1])
    total = total + alpha**2 * one**2 + beta**2 * 2 / q.shape[-1] ** 0.5 * one
  return total


def hedgehog(x):
  """exp(x_i) and exp(-x_i) over the sum of all of them."""
  up, down = np.exp(x), np.exp(-x)
  total = np.sum(up + down, -1, keepdims=True)
  return np.concatenate([up, down], -1) / total


def positive_random(x, w, printed=False):
  """FAVOR+ features of x [H] for each row of w; `printed` as in 2103.14636.

  That survey's eq. 34 prints a product where the paper has a difference.
  """
  half = np.sum(x * x) / 2
  return np.exp(w @ x * half if printed else w @ x - half) / np.sqrt(len(w))


def fourier_kernel(q, k, w):
  """mean_i cos(w_i . (q_t - k_s)), w [N, m, H]."""
  difference = q[:, :, None] - k[:, None]
  angle = np.einsum('btsnh,nmh->bntsm', difference, w)
  return np.cos(angle).mean(-1)


def layer_norm(x, scale, bias, *, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def silu(x):
  return x / (1 + np.exp(-x))


def visible(ids, causal):
  """[B, 1, T, T], whether a token reads another: same segment, not later."""
  index = np.arange(ids.shape[1])
  mask = ids[:, :, None] == ids[:, None]
  return (mask & (index[:, None] >= index) if causal else mask)[:, None]


def decays(log_decay):
  """exp of the gates between two tokens: log_decay [B, T, N] -> [B,N,T,T]."""
  total = np.moveaxis(np.cumsum(log_decay, 1), 1, 2)
  # For s > t too: a bidirectional pair decays by the gates of [t, s) then.
  before = total - np.moveaxis(log_decay, 1, 2)
  forward = total[..., :, None] - total[..., None, :]
  backward = before[..., None, :] - before[..., :, None]
  index = np.arange(log_decay.shape[1])
  return np.exp(np.where(index[:, None] >= index, forward, backward))


def attend(weights, v, mask, normalize=True):
  """Sum of masked weights times values, over the sum of the weights."""
  weights = np.where(mask, weights, 0)
  out = np.einsum('bnts,bsnv->btnv', weights, v)
  if not normalize:
    return out
  total = np.moveaxis(weights.sum(-1), 1, 2)[..., None]
  return np.divide(out, total, out=np.zeros_like(out), where=total != 0)


def depthwise(x, weight, ids, causal):
  """Depthwise convolution of x [B, T, N, H] that stays in its segment."""
  taps = len(weight)
  now = taps - 1 if causal else taps // 2
  out = np.zeros_like(x)
  for b, t in np.ndindex(*ids.shape):
    for i in range(taps):
      s = t + i - now
      if 0 <= s < ids.shape[1] and ids[b, s] == ids[b, t]:
        out[b, t] += weight[i] * x[b, s]
  return out


def long_conv(x, rates, mixture, ids):
  """sum_{s <= t} K[t - s] x_s, K a mixture of exponentials per channel."""
  a = np.exp(-np.exp(rates))
  out = np.zeros_like(x)
  for b, t in np.ndindex(*ids.shape):
    for s in range(t + 1):
      if ids[b, s] == ids[b, t]:
        kernel = (mixture * (1 - a) * a ** (t - s)).sum(-1)
        out[b, t] += kernel * x[b, s]
  return out
