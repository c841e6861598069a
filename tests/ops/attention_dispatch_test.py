import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import (
  IMPLEMENTATIONS,
  attention,
  explain_attention,
)
from tests.ops.attention_cases import make_arrays


def test_dispatch_by_size():
  q, k, v = make_arrays(4, 4, B=1, N=1, K=1)

  def of_length(T, S):
    return [
      jax.ShapeDtypeStruct((x.shape[0], n, *x.shape[2:]), x.dtype)
      for x, n in ((q, T), (k, S), (v, S))
    ]

  assert explain_attention(*of_length(512, 512)).startswith(
    'reference: T * S = 262144'
  )
  assert explain_attention(*of_length(1, 2**20)).startswith(
    'reference: one query row'
  )
  assert explain_attention(*of_length(4096, 4096), mask=masks.Causal()) == (
    'blockwise: T * S = 16777216 logits per head are over 262144; visits 72 of'
    ' 128 tiles of 256 x 512; not pallas_tpu: H = 4, it takes 16 to 256'
  )
  assert explain_attention(q, k, v, implementation='blockwise').startswith(
    'blockwise: the implementation asked for; visits 1 of 1 tiles'
  )


def test_the_public_op():
  q, k, v = make_arrays(9, 9)
  bias = jnp.asarray(np.random.default_rng(0).standard_normal((4, 9, 9)))
  how = {'mask': masks.Causal(), 'bias': bias.astype(jnp.float32)}
  out, lse = attention(q, k, v, **how, return_lse=True)
  assert lse.shape == (2, 9, 4) and lse.dtype == jnp.float32
  for name in IMPLEMENTATIONS:
    found = attention(q, k, v, **how, implementation=name)
    np.testing.assert_allclose(found, out, atol=1e-6)
  # The peer this package is compared with.
  peer = jax.nn.dot_product_attention(q, k, k, is_causal=True)
  np.testing.assert_allclose(
    attention(q, k, k, mask=masks.Causal()), peer, atol=1e-6
  )


def test_decoding_with_a_traced_offset_is_one_program(monkeypatch):
  T = 9
  q, k, v = make_arrays(T, T)
  full = attention(q, k, v, mask=masks.Causal())
  traces = []

  @jax.jit
  def decode(q, position):
    traces.append(position)
    return attention(q, k, v, mask=masks.Causal(position))

  for t in range(T):
    found = decode(q[:, t : t + 1], jnp.int32(t))
    np.testing.assert_allclose(found[:, 0], full[:, t], atol=1e-6)
  assert len(traces) == 1


def test_a_sequence_falls_back_and_a_name_fails_fast(monkeypatch):
  q, k, v = make_arrays(5, 5)

  def cannot(*args, **kwargs):
    raise NotImplementedError('no such device; use reference')

  monkeypatch.setitem(IMPLEMENTATIONS, 'kernel', cannot)
  with pytest.raises(NotImplementedError, match='kernel: no such device'):
    attention(q, k, v, implementation='kernel')
  fallback = ('kernel', 'reference')
  np.testing.assert_array_equal(
    attention(q, k, v, implementation=fallback),
    attention(q, k, v, implementation='reference'),
  )
  assert explain_attention(q, k, v, implementation=fallback) == (
    'reference: the implementation asked for; not kernel: no such device; use'
    ' reference'
  )
  assert explain_attention(q, k, v, implementation='kernel').startswith(
    'none; not kernel'
  )


@pytest.fixture
def unchecked():
  """Our own errors, not those of the annotations that tests check."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


F4 = np.float32
ERRORS = {
  'rank': ({'query': ((5, 4, 8), F4)}, r'query of shape .* has 3 axes'),
  'batch': ({'key': ((3, 6, 2, 8), F4)}, 'axis B is 3 but 2 in query'),
  'head dim': ({'key': ((2, 6, 2, 4), F4)}, 'axis H is 4 but 8 in query'),
  'length': ({'value': ((2, 7, 2, 3), F4)}, 'axis S is 7 but 6 in key'),
  'kv heads': ({'value': ((2, 6, 4, 3), F4)}, 'axis K is 4 but 2 in key'),
  'groups': (
    {'key': ((2, 6, 3, 8), F4), 'value': ((2, 6, 3, 8), F4)},
    'N = 4 query heads cannot share K = 3',
  ),
  'empty': ({'query': ((2, 0, 4, 8), F4)}, 'axis T is 0'),
  'integers': ({'query': ((2, 5, 4, 8), np.int32)}, 'query has dtype int32'),
  'dtypes': ({'key': ((2, 6, 2, 8), jnp.bfloat16)}, 'bfloat16 but query has'),
  'sinks': ({'sinks': ((2,), F4)}, r'sinks of shape \(2,\) must be \[N\]'),
  'cap': ({'logits_soft_cap': 0.0}, 'logits_soft_cap is 0.0'),
  'mask': ({'mask': ((5, 6), bool)}, r'masks.Dense\(array\)'),
  'mask heads': (
    {'mask': masks.Dense(np.ones((3, 5, 6), bool))},
    'mask of shape .* axis N is 3 but N is 4',
  ),
  'mask length': (
    {'mask': masks.Dense(np.ones((6, 6), bool))},
    'axis T .* is 6 but T is 5',
  ),
  'bias batch': (
    {'bias': ((3, 1, 5, 6), F4)},
    'bias .* axis B is 3 but B is 2',
  ),
  'name': (
    {'implementation': 'blockwize'},
    "'blockwize' does not exist; did you mean 'blockwise'",
  ),
  'no name': ({'implementation': ()}, 'implementation is empty'),
}


@pytest.mark.parametrize('case', list(ERRORS))
def test_errors_name_the_axis_and_the_remedy(unchecked, case):
  changes, message = ERRORS[case]
  arguments = {
    'query': ((2, 5, 4, 8), F4),
    'key': ((2, 6, 2, 8), F4),
    'value': ((2, 6, 2, 3), F4),
  } | changes
  arrays = ('query', 'key', 'value', 'sinks', 'mask', 'bias')
  for name, value in arguments.items():
    if name in arrays and isinstance(value, tuple):
      arguments[name] = jnp.ones(*value)
  with pytest.raises(ValueError, match=message):
    attention(
      arguments.pop('query'),
      arguments.pop('key'),
      arguments.pop('value'),
      **arguments,
    )
