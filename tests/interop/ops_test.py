"""Our recurrences against the functions of Hugging Face transformers.

What the blocks do not reach: states that are not zero, grouped heads, several
chunks on both sides, states after the last token, large gates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.ops.recurrent.wkv4 import wkv4

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

from tests.interop.pairs import modeling  # noqa: E402

B, T, K, N, H, V = 2, 37, 2, 4, 6, 12
TOLERANCE = 1e-5


def draw(*shape, seed=0):
  numbers = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(numbers, float)


def unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def to_torch(*arrays):
  return [torch.from_numpy(np.array(a)) for a in arrays]


def run(op, *args, **options):
  """Jits an op; arrays among its options are constants, which cost nothing."""
  op = jax.jit(functools.partial(op, **options))
  return op(*args)


def check(ours, theirs, tolerance):
  for a, b in zip(ours, theirs, strict=True):
    b = b.numpy()
    assert a.shape == b.shape and np.abs(b).max() > 1e-3
    assert np.abs(a - b).max() < tolerance * np.abs(b).max()


@pytest.mark.parametrize('theirs', ['chunkwise', 'recurrent'])
@pytest.mark.parametrize('gate', ['channel', 'scalar'])
def test_delta_rule(gate, theirs):
  heads = K if gate == 'scalar' else N  # theirs groups heads for scalars only
  q, k = unit(draw(B, T, heads, H, seed=1)), unit(draw(B, T, heads, H, seed=2))
  v, state = draw(B, T, N, V, seed=3), draw(B, N, H, V, seed=4)
  beta = jax.nn.sigmoid(2 * draw(B, T, N, seed=5))
  # Decays from 1e-6 to 3000, or 12: the differences of sums over a chunk that
  # theirs takes would round by more than 1e-5.
  spread = 3 if theirs == 'recurrent' else 1.5
  shape = (B, T, N) if gate == 'scalar' else (B, T, N, H)
  log_decay = -jnp.exp(spread * draw(*shape, seed=6) - 3)
  if gate == 'scalar':
    hf = modeling('qwen3_next')

    forms = hf.torch_chunk_gated_delta_rule, hf.torch_recurrent_gated_delta_rule
  else:
    hf = modeling('kimi_linear')

    forms = hf.chunk_kimi_delta_attention, hf.recurrent_kimi_delta_attention
  options = dict(
    initial_state=to_torch(state)[0], output_final_state=True, chunk_size=8
  )
  tensors = to_torch(q, k, v, log_decay, beta)
  expected = forms[theirs == 'recurrent'](*tensors, **options)
  options = dict(log_decay=log_decay, initial_state=state, chunk_size=16)
  for form in sorted({'chunkwise', theirs}):
    ours = run(delta_rule, q, k, v, beta, form=form, **options)
    check(ours, expected, TOLERANCE)


@pytest.mark.parametrize('theirs', ['chunkwise', 'recurrent'])
def test_mlstm_with_large_gates(theirs):
  hf = modeling('xlstm')

  length = 40  # theirs is for whole chunks
  with jax.enable_x64(True):  # n . q cancels: float32 would lose digits
    q, k = draw(B, length, N, H, seed=1), draw(B, length, N, H, seed=2)
    v = draw(B, length, N, V, seed=3)
    gate = 20 * draw(B, length, N, seed=4)
    forget = 5 * draw(B, length, N, seed=5)
    c, n = draw(B, N, H, V, seed=6), draw(B, N, H, seed=7)
    m = 3 * draw(B, N, seed=8)
    tensors = [a.swapaxes(1, 2) for a in to_torch(q, k, v, gate, forget)]
    options = dict(
      zip(
        ('c_initial', 'n_initial', 'm_initial'),
        to_torch(c, n, m[..., None]),
        strict=True,
      ),
      return_last_states=True,
      eps=0.0,
    )
    if theirs == 'chunkwise':
      h, last = hf.mlstm_chunkwise_native_autograd(
        *(a.contiguous() for a in tensors), **options, chunk_size=8
      )
    else:
      h, last = hf.mlstm_recurrent_sequence_native(
        *tensors, **options, dtype_state=torch.float64
      )
    c_last, n_last, m_last = last
    for form in sorted({'chunkwise', theirs}):
      out, (c_ours, n_ours, m_ours) = run(
        mlstm,
        q,
        k,
        v,
        gate,
        jax.nn.log_sigmoid(forget),
        initial_state=(c, n, m),
        form=form,
        chunk_size=16,
      )
      # The same memory in units of another maximum.
      scale = jnp.exp(m_ours - m_last.reshape(m.shape).numpy())
      check(
        (
          out,
          c_ours * scale[..., None, None],
          n_ours * scale[..., None],
        ),
        (h.swapaxes(1, 2), c_last, n_last),
        1e-10,
      )


def test_wkv4_with_large_keys():
  from transformers.models.rwkv import modeling_rwkv as hf

  k, v = 20 * draw(B, T, N, H, seed=1), draw(B, T, N, H, seed=2)
  rate, bonus = draw(N, H, seed=3) - 1, 3 * draw(N, H, seed=4)
  expected, _ = hf.rwkv_linear_attention_cpu(
    *to_torch(*(a.reshape(*a.shape[:-2], -1) for a in (rate, bonus, k, v)))
  )
  for form in ('chunkwise', 'recurrent'):
    options = dict(log_decay=-jnp.exp(rate), bonus=bonus, chunk_size=16)
    out, _ = run(wkv4, k, v, form=form, **options)
    check([out], [expected.reshape(out.shape)], TOLERANCE)
