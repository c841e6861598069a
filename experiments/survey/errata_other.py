"""Other equations that two surveys print wrong, in both forms.

Each function evaluates a printed equation, the corrected one and our op, and
returns the errors of the three against what they stand for.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import attention, fast_weights, masks
from efficient_attn.ops.low_rank.synthesizer import factorized_dense
from efficient_attn.ops.recurrent.feature_maps import positive_random
from efficient_attn.ops.softmax.fake_quant import fake_quant
from experiments.survey.errata_linear import C, H, T, error, ours, tokens
from experiments.survey.models import mixer

MISFIT = 'shapes do not fit'


def kv_heads() -> tuple:
  """E8: two kv heads for four query heads, by Kronecker products."""
  rng = np.random.default_rng(0)
  heads, kv = 4, 2
  q = rng.standard_normal((T, heads, H))
  k, v = rng.standard_normal((2, T, kv, H))
  ones = np.ones((1, heads // kv))

  def attend(key, value):  # of [T, heads, H]
    out = np.zeros_like(q)
    for t, n in np.ndindex(T, heads):
      weights = np.exp(key[: t + 1, n] @ q[t, n] / H**0.5)
      out[t, n] = weights @ value[: t + 1, n] / weights.sum()
    return out

  def expanded(x, product):
    rows = [[product(head[None], ones)[0] for head in token] for token in x]
    return np.reshape(rows, (T, heads, H))

  def as_printed(head, ones):
    return np.kron(head, ones)

  def corrected(head, ones):
    return np.kron(ones, head)

  group = [n // (heads // kv) for n in range(heads)]
  wanted = attend(k[:, group], v[:, group])
  results = [
    attend(*(expanded(x, product) for x in (k, v)))
    for product in (as_printed, corrected)
  ]
  with jax.enable_x64(True):
    arrays = (jnp.asarray(x)[None] for x in (q, k, v))
    found = np.asarray(attention(*arrays, mask=masks.Causal()))[0]
  return tuple(error(x, wanted) for x in (*results, found))


def random_features(hyperbolic=False) -> tuple:
  """E10: the expectation over w in two dimensions, by quadrature.

  Of our op with w and -w (FL eq. 35) if `hyperbolic`.
  """
  x, y = np.array([[0.7, -0.5], [0.2, -0.9]])
  nodes, weights = np.polynomial.hermite_e.hermegauss(40)
  w = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
  weights = np.outer(weights, weights).reshape(-1) / (2 * np.pi)

  def expected(features):
    return np.array([weights @ (features(x) * features(y))])

  def as_printed(x):
    return np.exp(w @ x * (x @ x) / 2)

  def corrected(x):
    return np.exp(w @ x - x @ x / 2)

  def ours(x):
    with jax.enable_x64(True):
      found = positive_random(
        jnp.asarray(x), jnp.asarray(w), hyperbolic=hyperbolic
      )
      return np.asarray(found).reshape(-1, len(w)) * len(w) ** 0.5

  def expected_of_ours():
    return np.array([np.sum(ours(x) * ours(y) @ weights)])

  wanted = np.array([np.exp(x @ y)])
  results = expected(as_printed), expected(corrected), expected_of_ours()
  return tuple(error(x, wanted) for x in results)


def quantisation() -> tuple:
  """E11: what 8 bits hold of weights, whose codes are 0 to 255."""
  w = np.linspace(-0.3, 2, 1001)
  scale = (w.max() - w.min()) / 255
  zero = np.round(w.min() / scale)
  printed = np.clip(np.round(w / scale + zero), 0, 255)
  corrected = np.clip(np.round(w / scale - zero), 0, 255)
  found = np.asarray(fake_quant(jnp.float32(w), 'uint8', (None,)))
  results = scale * (printed - zero), scale * (corrected + zero), found
  return tuple(error(x, w) for x in results)


def factors() -> tuple:
  """E12: how the factors of a Synthesizer's logits meet."""
  rng = np.random.default_rng(0)
  outer, inner = rng.standard_normal((T, 8)), rng.standard_normal((T, 4))
  wanted = np.zeros((T, T))
  for t, i, j in np.ndindex(T, 8, 4):
    wanted[t, 4 * i + j] = outer[t, i] * inner[t, j]
  tiled = np.repeat(outer, 4, axis=1), np.tile(inner, 8)
  with jax.enable_x64(True):
    arrays = (jnp.asarray(x)[None, None] for x in (outer, inner))
    found = np.asarray(factorized_dense(*arrays))[0, 0]
  results = tiled[0] @ tiled[1].T, tiled[0] * tiled[1], found
  return tuple(error(x, wanted) for x in results)


def log_sparse() -> tuple:
  """E13: wrong keys of all queries, as a share of the right ones."""
  wanted, printed, corrected = (np.zeros((T, T), bool) for _ in range(3))
  for i in range(1, T + 1):  # positions count from 1
    steps = [2**e for e in range(i.bit_length())]
    wanted[i - 1, [i - 1] + [i - 1 - s for s in steps if s < i]] = True
    near = [i, *(i - s for s in steps[:-1])]
    for pairs, last in ((printed, -steps[-1]), (corrected, i - steps[-1])):
      pairs[i - 1, [j - 1 for j in (*near, last) if j > 0]] = True
  found = masks.LogSparse(0) & masks.Causal()
  found = np.asarray(found.dense(T, T))[0, 0]
  results = printed, corrected, found
  return tuple(float((x ^ wanted).sum() / wanted.sum()) for x in results)


def product(*widths: tuple[int, ...]) -> float | str:
  """Whether tokens of width 64 have a product with weights of these shapes."""
  x = np.zeros((T, 64))
  try:
    for shape in widths:
      x = np.tensordot(x, np.zeros(shape), 1)
  except ValueError:
    return MISFIT
  return 0.0


def query_of_mfa() -> tuple:
  """E16: the query through W^down twice, and through W^down W^up."""
  query = mixer('mfa', 64, 4).query
  down, up = query.down.weight.shape, query.up.weight.shape
  return product(down, down), product(down, up), product(down, up)


def width_of_keys() -> tuple:
  """E17: keys from weights with h d rows, where h d is not the model's."""
  key = mixer('attention', 64, 4, head_dim=32).qkv.key.weight.shape
  printed = (4 * 32, *key[1:])
  return product(printed), product((64, *key[1:])), product(key)


def descended(*arrays, chunk_size: int) -> np.ndarray:
  """Reads [T, H] of a linear model that starts at zero and learns."""

  def op(*arrays):
    weights = ((jnp.zeros((1, H, H), arrays[0].dtype), None),)
    return fast_weights(*arrays, weights=weights, chunk_size=chunk_size)

  return ours(op, *(x[:, None] for x in arrays))[:, 0]


def learning_rate() -> tuple:
  """E14: what a token's own answer misses after its update, 1 token a step.

  A step of gradient descent of |S^T k - v|^2 / 2 must not make it worse; with
  the rate 1 / |k|^2 nothing is missing.
  """
  _, k, v, *_ = tokens()
  best = 1 / (k * k).sum(1)

  def descend(rates):
    state, out = np.zeros((H, H)), []
    for t in range(T):
      state = state - rates[t] * np.outer(k[t], k[t] @ state - v[t])
      out.append(k[t] @ state)
    return np.array(out)

  found = descended(k, k, v, best, chunk_size=1)
  results = descend(np.ones(T)), descend(best), found
  return tuple(error(x, v) for x in results)


def index_of_the_sum() -> tuple:
  """E14: the gradient of a mini-batch, token t's for every token i."""
  q, k, v, *_ = tokens()
  rate = 0.05

  def descend(printed):
    state, out = np.zeros((H, H)), []
    for start in range(0, T, C):
      base, span = state, range(start, start + C)
      for t in span:
        terms = [t] * (t + 1 - start) if printed else range(start, t + 1)
        gradient = sum(np.outer(k[i], k[i] @ base - v[i]) for i in terms)
        state = base - rate * gradient
        out.append(q[t] @ state)
    return np.array(out)

  state, wanted = np.zeros((H, H)), []
  for t in range(T):
    base = state if t % C == 0 else base
    state = state - rate * np.outer(k[t], k[t] @ base - v[t])
    wanted.append(q[t] @ state)
  found = descended(q, k, v, np.full(T, rate), chunk_size=C)
  results = descend(True), descend(False), found
  return tuple(error(x, np.array(wanted)) for x in results)
