"""Score functions, synthesised logits, lambdas, and attention from logits."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.models import cost
from efficient_attn.ops.low_rank import synthesizer
from efficient_attn.ops.low_rank.lambda_layer import lambda_layer
from efficient_attn.ops.softmax import score_functions
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.logits import attend_logits
from tests.ops.low_rank_cases import check, normal, place, unchecked
from tests.optimized import optimized
from tests.oracles import low_rank as oracle

B, T, S, N, H, G, A, V = 2, 5, 7, 2, 3, 4, 6, 3

SCORES = {
  'additive': dict(
    query=(B, T, N, G),
    key=(B, S, N, H),
    query_weight=(N, G, A),
    key_weight=(N, H, A),
    weight=(N, A),
  ),
  'dot': dict(query=(B, T, N, H), key=(B, S, N, H)),
  'general': dict(query=(B, T, N, G), key=(B, S, N, H), weight=(N, G, H)),
}


@pytest.mark.parametrize('name', sorted(SCORES))
def test_scores(name):
  check(
    getattr(score_functions, name),
    getattr(oracle, name),
    normal(0, **SCORES[name]),
  )


def test_dot_products_are_attention():
  @jax.jit
  def pairs(data, value, eye):
    dot = score_functions.dot(**data)
    return (
      (attend_logits(dot, value), attention(**data, value=value, scale=1.0)),
      (
        attend_logits(score_functions.scaled_dot(**data), value),
        attention(**data, value=value),
      ),
      (score_functions.general(**data, weight=eye), dot),
    )

  data = normal(1, query=(B, T, N, H), key=(B, S, N, H))
  value = normal(2, v=(B, S, N, V))['v']
  with jax.enable_x64(True):
    for pair in pairs(data, value, np.stack([np.eye(H)] * N)):
      np.testing.assert_allclose(*pair, rtol=0, atol=1e-12)


@pytest.mark.parametrize('batch', [1, B])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_from_logits(batch, masked):
  mask = None
  if masked:
    mask = np.random.default_rng(3).random((B, 1, T, S)) < 0.5
    mask[0, 0, 2] = False  # a row that sees nothing
    mask = jnp.asarray(mask)
  check(
    functools.partial(attend_logits, mask=mask),
    functools.partial(oracle.from_logits, mask=mask),
    normal(4, logits=(batch, N, T, S), value=(B, S, N, V)),
  )


def test_extreme_logits():
  logits = np.array([1e30, 0, -1e30, 88, -3e38, 3e38], np.float32)
  logits = np.broadcast_to(logits, (1, 1, 6, 6))
  value = normal(5, v=(1, 6, 1, 2))['v'].astype(np.float32)
  mask = jnp.tri(6, dtype=bool)[None, None]

  def loss(logits, value):
    out = attend_logits(logits, value, mask=mask)
    return out.sum(), out

  (_, out), gradients = optimized(
    jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  )(logits, value)
  expected = oracle.from_logits(logits.astype(np.float64), value, mask)
  np.testing.assert_allclose(out, expected, rtol=1e-6)
  chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize('length, window', [(1, 3), (2, 7), (9, 5), (9, 1)])
def test_lambda_layer(length, window):
  shapes = dict(
    query=(B, length, N, G),
    key=(B, length, G),
    value=(B, length, V),
    embedding=(window, G),
  )
  check(lambda_layer, oracle.lambda_layer, normal(6, **shapes))


def test_factorized_dense():
  check(
    synthesizer.factorized_dense,
    oracle.factorized_dense,
    normal(7, outer=(B, N, T, 3), inner=(B, N, T, 4)),
  )


def test_factorized_random():
  check(
    synthesizer.factorized_random,
    lambda rows, columns: (rows @ columns.swapaxes(-1, -2))[None],
    normal(8, rows=(N, T, 3), columns=(N, S, 3)),
  )


def test_factorized_dense_as_printed_is_another_cubic_method():
  """E12: eq. 26 of Fournier et al. multiplies the tiled factors as matrices."""

  def printed(outer, inner):
    """H_A(A) H_B(B)^T, both of them n x n."""
    a, b = outer.shape[-1], inner.shape[-1]
    rows = jnp.repeat(outer, b, axis=-1)
    return rows @ jnp.tile(inner, a).swapaxes(-1, -2)

  def case(n):
    data = normal(9, outer=(1, 1, n, n // 4), inner=(1, 1, n, 4))
    return data | normal(9, value=(1, n, 1, 8))

  def exponent(logits):
    def run(outer, inner, value):
      return attend_logits(logits(outer, inner), value)

    small, large = (cost.flops(run, *case(n).values()) for n in (512, 1024))
    return math.log2(large / small)

  assert exponent(printed) == pytest.approx(3, abs=0.05)
  assert exponent(synthesizer.factorized_dense) == pytest.approx(2, abs=0.05)
  data = case(8)
  del data['value']
  expected = oracle.factorized_dense(**data)
  assert np.abs(printed(**data) - expected).max() > 0.1 * np.abs(expected).max()


@unchecked()
def test_wrong_calls():
  shapes = dict(query=(B, 3, N, G), key=(B, 3, G), value=(B, 3, V))
  data = place(normal(0, **shapes, embedding=(4, G)))
  with pytest.raises(ValueError, match='4 distances: pass an odd number'):
    lambda_layer(**data)
  with pytest.raises(
    ValueError, match=r'key has shape \(2, 2, 4\): pass \(2, 3'
  ):
    wrong = dict(key=data['key'][:, :2], embedding=data['embedding'][:3])
    lambda_layer(**data | wrong)
  with pytest.raises(ValueError, match=r'logits .*: pass \(2, 2, 5, 3\)'):
    value = data['query'][..., :2]
    attend_logits(jnp.ones((2, 2, 5, 4)), value)
