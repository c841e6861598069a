"""Forget gates of mLSTM beside exponential input gates: exact at any size.

The oracle is the recurrence as the paper prints it, without stabilisation, in
numpy's long double, whose exponents reach 11356.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.mlstm import mlstm

FORMS = ['recurrent', 'chunkwise', 'parallel']
B, T, N, H, V = 32, 9, 2, 3, 2


def oracle(q, k, v, gate, forget):
  q, k, v, gate, forget = (
    x.astype(np.longdouble) for x in (q, k, v, gate, forget)
  )
  memory = np.zeros((B, N, H, V + 1), np.longdouble)
  values = np.concatenate([v, np.ones_like(v[..., :1])], -1)
  outs = []
  for t in range(T):
    write = k[:, t, :, :, None] * values[:, t, :, None]
    memory = np.exp(forget[:, t])[..., None, None] * memory
    memory = memory + np.exp(gate[:, t])[..., None, None] * write
    out = np.einsum(
      'bnh,bnhv->bnv', q[:, t] / np.sqrt(np.longdouble(H)), memory
    )
    outs.append(out[..., :-1] / np.maximum(abs(out[..., -1:]), 1))
  return np.stack(outs, 1).astype(np.float64)


def draws():
  rng = np.random.default_rng(0)
  q, k = rng.standard_normal((2, B, T, N, H))
  v = rng.standard_normal((B, T, N, V))
  sizes = rng.choice([-200, -10, 0, 5, 120, 300, 1000], size=(B, T, N))
  gate = sizes * rng.random((B, T, N))
  sizes = rng.choice([0.1, 1, 100, 300, 3000], size=(B, T, N))
  forget = -sizes * rng.random((B, T, N))
  forget = np.where(rng.random((B, T, N)) < 0.2, -np.inf, forget)
  return [x.astype(np.float32) for x in (q, k, v, gate, forget)]


@pytest.mark.parametrize('form', FORMS)
def test_gates_of_any_size(form):
  arrays = draws()
  wanted = oracle(*arrays)

  @jax.jit
  def run(*arrays):
    def loss(*arrays):
      out, _ = mlstm(*arrays, form=form, chunk_size=4)
      return jnp.sum(out), out

    return jax.grad(loss, argnums=range(5), has_aux=True)(*arrays)

  gradients, out = run(*map(jnp.asarray, arrays))
  # A row is as exact as its denominator, which may be a small difference.
  error = np.abs(np.asarray(out) - wanted) / np.maximum(np.abs(wanted), 1)
  assert error.max() < 1e-3 and np.median(error) < 1e-6
  names = 'q', 'k', 'v', 'input_gate', 'log_forget'
  for name, x in zip(names, gradients, strict=True):
    assert np.isfinite(x).all(), name


@pytest.mark.parametrize('form', FORMS)
def test_a_reset_after_a_large_input(form):
  ones = jnp.ones((1, 2, 1, 1))
  v = jnp.array([5.0, 7.0]).reshape(ones.shape)
  gate = jnp.array([[[120.0], [0.0]]])
  forget = jnp.array([[[0.0], [-jnp.inf]]])
  out, _ = mlstm(ones, ones, v, gate, forget, form=form, chunk_size=16)
  np.testing.assert_array_equal(out.ravel(), [5, 7])
