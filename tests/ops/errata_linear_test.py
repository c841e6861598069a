"""Equations of gated linear attention that surveys print wrong.

Each test evaluates the printed form and the corrected one in float64. The
printed form must miss the recurrence, the corrected one must hit it, and so
must the op. Chunks are counted from 0 and hold C tokens; with rank-1 gates

  H_t = (a_t^T b_t) * H_{t-1} + (c_t * k_t)^T (e_t * v_t),   o_t = q_t H_t,

A_j and L_j are the products of the first j gates a and b of a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.gated_slot_attention import (
  gated_slot_attention,
)
from efficient_attn.ops.recurrent.linear_attention import linear_attention

T, D, C = 32, 6, 8
CHUNKS = T // C


def gates_and_tokens(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = rng.standard_normal((3, T, D))
  a, b = rng.uniform(0.8, 1.0, (2, T, D))
  c, e = rng.uniform(0.5, 1.0, (2, T, D))
  return q, k, v, a, b, c, e


def recurrence(q, k, v, a, b, c, e):
  h, out = np.zeros((D, D)), []
  for t in range(T):
    h = np.outer(a[t], b[t]) * h + np.outer(c[t] * k[t], e[t] * v[t])
    out.append(q[t] @ h)
  return np.array(out)


def chunkwise(
  q, k, v, a, b, c, e, *, read_gate=0, ratio=1, carry=0, product=False
):
  """The chunkwise form; the options are the misprints."""
  chunks = [x.reshape(CHUNKS, C, D) for x in (q, k, v, a, b, c, e)]
  states, out, previous = [np.zeros((D, D))], [], np.ones((C, D))
  for q, k, v, a, b, c, e in zip(*chunks, strict=True):
    A, L = np.cumprod(a, 0), np.cumprod(b, 0)
    inside = ((q * A) @ (k * c / A).T * np.tri(C)) @ (v * e / L) * L
    across = (q * A) @ states[-1] * (previous if read_gate else L)
    out.append(inside + across)
    previous = L
    if product:  # products over all later tokens of everything
      keys, values = (
        np.array([np.prod(x[m + 1 :], 0) for m in range(C)])
        for x in (a * c * k, b * e * v)
      )
    else:
      # Token j of 1...C decays by A_C / A_j; off by one: A_C / A_{j-1}.
      shift = np.ones((1, D))
      after_a, after_b = A[-1] / A, L[-1] / L
      if ratio == 0:
        after_a = A[-1] / np.concatenate([shift, A[:-1]])
        after_b = L[-1] / np.concatenate([shift, L[:-1]])
      keys, values = after_a * c * k, after_b * e * v
    kept = states[-1 - carry] if len(states) > carry else np.zeros((D, D))
    states.append(np.outer(A[-1], L[-1]) * kept + keys.T @ values)
  return np.concatenate(out)


@functools.partial(
  jax.jit,
  static_argnames=('form', 'read'),
)
def linear(q, k, v, log_decay, form, read):
  return linear_attention(
    q,
    k,
    v,
    log_decay=log_decay,
    scale=1,
    form=form,
    read=read,
    chunk_size=C,
  )[0]


def op(q, k, v, a, b, c, e, *, form='chunkwise', read='inclusive'):
  """The same by `linear_attention`: a head for every value channel."""
  log_decay = np.log(a)[:, None, :] + np.log(b)[:, :, None]
  tokens = q[:, None], (c * k)[:, None], (e * v)[:, :, None], log_decay
  with jax.enable_x64(True):
    out = linear(*(x[None] for x in map(jnp.asarray, tokens)), form, read)
    return np.asarray(out)[0, :, :, 0]


def error(actual, expected):
  return np.abs(actual - expected).max() / np.abs(expected).max()


def test_corrected_chunks_and_the_op_are_the_recurrence():
  tokens = gates_and_tokens()
  expected = recurrence(*tokens)
  assert error(chunkwise(*tokens), expected) < 1e-12
  for form in ('chunkwise', 'parallel', 'recurrent'):
    assert error(op(*tokens, form=form), expected) < 1e-12


@pytest.mark.parametrize(
  'misprint',
  [
    # The state is read through the value gates of the chunk before.
    pytest.param(dict(read_gate=1), id='E1-eq57d'),
    # Decays to the end of the chunk count from the token before.
    pytest.param(dict(ratio=0), id='E2-eq108'),
    # The state of two chunks ago is carried.
    pytest.param(dict(carry=1), id='E3-eq110'),
    # Keys are multiplied with each other instead of decayed.
    pytest.param(dict(product=True), id='E4-eq103'),
  ],
)
def test_printed_chunk_equation_is_wrong(misprint):
  tokens = gates_and_tokens()
  assert error(chunkwise(*tokens, **misprint), recurrence(*tokens)) > 0.05


def test_e5_retention_reads_the_state_of_its_own_chunk():
  q, k, v, *_ = gates_and_tokens()
  gamma = 0.9
  ones = np.ones((T, D))
  expected = recurrence(q, k, v, gamma * ones, ones, ones, ones)
  inside_decay = np.tril(gamma ** (np.arange(C)[:, None] - np.arange(C)))
  read = gamma ** np.arange(1, C + 1)[:, None]
  write = gamma ** np.arange(C - 1, -1, -1)[:, None]

  def retention(lag):
    qs, ks, vs = (x.reshape(CHUNKS, C, D) for x in (q, k, v))
    states, out = [np.zeros((D, D))], []
    for i in range(CHUNKS):
      j = i - lag
      across = (qs[j] @ states[j]) * read if j >= 0 else 0
      out.append((qs[i] @ ks[i].T * inside_decay) @ vs[i] + across)
      states.append(gamma**C * states[i] + ks[i].T @ (vs[i] * write))
    return np.concatenate(out)

  assert error(retention(lag=0), expected) < 1e-12
  assert error(retention(lag=1), expected) > 0.05  # (Q_[i] H_[i-1]) * xi
  with jax.enable_x64(True):
    ours, _ = linear_attention(
      *(jnp.asarray(x[None, :, None]) for x in (q, k, v)),
      log_decay=jnp.log(jnp.array([gamma])),
      scale=1,
      form='chunkwise',
      chunk_size=C,
    )
  assert error(np.asarray(ours)[0, :, 0], retention(lag=0)) < 1e-12


def slots_by_two_passes(q, k, v, alpha, *, printed):
  """Equation 75: two gated passes with a softmax between them."""
  slots = alpha.shape[1]
  first, second = np.zeros((D, slots)), np.zeros((slots, D))
  out = []
  for t in range(T):
    rows, columns = alpha[t][:, None], alpha[t][None]
    gates = (rows, columns) if printed else (columns, rows)
    first = gates[0] * first + np.outer(k[t], 1 - alpha[t])
    weights = np.exp(q[t] @ first)
    second = gates[1] * second + np.outer(1 - alpha[t], v[t])
    out.append(weights / weights.sum() @ second)
  return np.array(out)


def test_e6_slot_attention_decays_slots():
  q, k, v, alpha, *_ = gates_and_tokens()
  keys, values, expected = np.zeros((D, D)), np.zeros((D, D)), []
  for t in range(T):  # equation 74
    rows = alpha[t][:, None]
    keys = rows * keys + (1 - rows) * k[t]
    values = rows * values + (1 - rows) * v[t]
    weights = np.exp(keys @ q[t])
    expected.append(weights / weights.sum() @ values)
  expected = np.array(expected)
  corrected = slots_by_two_passes(q, k, v, alpha, printed=False)
  assert error(corrected, expected) < 1e-12
  printed = slots_by_two_passes(q, k, v, alpha, printed=True)
  assert error(printed, expected) > 0.05
  with jax.enable_x64(True):
    ours, _ = gated_slot_attention(
      *(jnp.asarray(x[None, :, None]) for x in (q, k, v, np.log(alpha))),
      scale=1,
      form='chunkwise',
      chunk_size=C,
    )
  assert error(np.asarray(ours)[0, :, 0], corrected) < 1e-12
  # With fewer slots than channels the printed gates do not even fit.
  with pytest.raises(ValueError, match='broadcast'):
    slots_by_two_passes(q, k, v, alpha[:, :-1], printed=True)


def test_e18_the_state_includes_the_current_token():
  q, k, v, *_ = gates_and_tokens()
  ones = np.ones((T, D))
  expected = recurrence(q, k, v, ones, ones, ones, ones)
  upto = np.array([q[t] @ (k[: t + 1].T @ v[: t + 1]) for t in range(T)])
  before = np.array([q[t] @ (k[:t].T @ v[:t]) for t in range(T)])
  assert error(upto, expected) < 1e-12
  assert error(before, expected) > 0.05
  tokens = q, k, v, ones, ones, ones, ones
  assert error(op(*tokens), upto) < 1e-12
  assert error(op(*tokens, read='exclusive'), before) < 1e-12


def test_e19_normalised_and_not_are_two_methods():
  """Eqs. 43 and 47 of the survey against eq. 48, shown as one method."""
  rng = np.random.default_rng(0)
  q, k = np.exp(rng.standard_normal((2, T, D)))
  v = rng.standard_normal((T, D))
  weights = q @ k.T * np.tri(T)
  plain, mean = weights @ v, weights / weights.sum(-1, keepdims=True) @ v
  assert error(plain, mean) > 0.05
  tokens = [jnp.asarray(x[None, :, None], jnp.float32) for x in (q, k, v)]
  for normalize, expected in ((False, plain), (True, mean)):
    out, _ = linear_attention(*tokens, scale=1, normalize=normalize)
    assert error(np.asarray(out)[0, :, 0], expected) < 1e-5


def test_e20_the_mask_inside_a_chunk_is_of_its_tokens():
  """Fig. 3 of the survey gives it the size of a head, D x D, not C x C."""
  q, k, *_ = gates_and_tokens()
  scores = q[:C] @ k[:C].T
  with pytest.raises(ValueError, match='broadcast'):
    scores * np.tri(D)
  assert (scores * np.tri(C)).shape == (C, C)


@pytest.mark.parametrize('decay, length', [(0.9, 1024), (0.95, 4096)])
def test_e25_cumulative_products_overflow_and_sums_of_logs_do_not(
  decay, length
):
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, length, 4)).astype(np.float32)
  h, expected = np.zeros((4, 4)), []
  for t in range(length):
    h = decay * h + np.outer(k[t], v[t]).astype(np.float64)
    expected.append(q[t] @ h)
  expected = np.array(expected)

  with np.errstate(all='ignore'):
    A = np.cumprod(np.full((length, 4), decay, np.float32), 0)
    scores = (q * A) @ (k / A).T
    printed = np.where(np.tri(length, dtype=bool), scores, 0) @ v
    assert np.isinf(1 / A[-1]).all()
  assert not np.isfinite(printed).all()
  for form in ('chunkwise', 'recurrent'):
    ours, _ = linear_attention(
      *(jnp.asarray(x[None, :, None]) for x in (q, k, v)),
      log_decay=jnp.full((1, length, 1, 4), np.log(decay), jnp.float32),
      scale=1,
      form=form,
    )
    assert error(np.asarray(ours)[0, :, 0], expected) < 1e-5
