"""Quantised attention: its rounding, its smoothing, and what both cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.ops.softmax.fake_quant import FORMATS, fake_quant, round_to
from efficient_attn.ops.softmax.sage_attention import (
  RECIPES,
  Recipe,
  accumulate,
  round_weights,
  sage_attention,
  sage_logits,
)
from tests.optimized import OPTIONS, optimized
from tests.oracles import quantization as oracle

# Other emitters drop some roundings to 8 bits and back.
rounded = functools.partial(
  jax.jit, compiler_options=OPTIONS | {'xla_backend_optimization_level': 0}
)


def relative(found, wanted):
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def make(T=256, S=256, N=2, K=2, H=64, bias=0.0, seed=0):
  """Queries, keys with an outlier in every channel, and values."""
  rng = np.random.default_rng(seed)
  shapes = (1, T, N, H), (1, S, K, H), (1, S, K, H)
  q, k, v = (rng.standard_normal(shape) for shape in shapes)
  k += bias * rng.standard_normal((1, 1, K, H))
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


@pytest.mark.parametrize('form', ['e2m1', 'e4m3', 'int4', 'int8'])
def test_rounding_against_the_table_of_numbers(form):
  values = oracle.numbers(form)
  assert values[-1] == FORMATS[form][1]
  middles = (values[1:] + values[:-1]) / 2
  beside = [middles * (1 + e) for e in (-1e-6, 1e-6)]
  random = np.random.default_rng(0).uniform(0, 1.1 * values[-1], 200)
  x = np.concatenate([values, middles, *beside, random, [1e9]])
  x = np.float32(np.concatenate([x, -x]))
  np.testing.assert_array_equal(
    rounded(round_to, static_argnums=1)(x, form), oracle.nearest(x, form)
  )


@pytest.mark.parametrize('low, high', [(-1, 2), (0.5, 3)])
@pytest.mark.parametrize('form', ['uint2', 'uint4', 'uint8'])
def test_e11_codes_of_affine_quantisation_start_at_zero(form, low, high):
  """Eq. 10 of Fournier et al. adds the zero point that it must subtract."""
  w = np.linspace(low, high, 1001)
  levels = 2 ** int(form[4:]) - 1
  scale = (high - low) / levels
  zero = np.round(low / scale)
  printed, codes = np.round(w / scale + zero), np.round(w / scale - zero)
  assert 0 <= codes.min() and codes.max() <= levels
  assert printed.min() < 0 or printed.max() > levels
  found = np.asarray(fake_quant(jnp.float32(w), form, (None,)))
  assert len(np.unique(found)) == levels + 1
  assert found.min() == np.float32(low)
  assert np.abs(found - w).max() < 0.5001 * scale


def test_e2m1_has_eight_magnitudes():
  wanted = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
  np.testing.assert_array_equal(oracle.numbers('e2m1'), wanted)
  assert len(oracle.numbers('e4m3')) == 127


def test_groups_share_a_scale():
  x = np.float32(np.random.default_rng(0).standard_normal((13, 21)))
  x[3:6] = 0
  for form, rows, columns, micro in (
    ('int8', 4, 21, False),
    ('e2m1', 1, 16, True),
    ('e4m3', 13, 1, False),
  ):
    group = (rows, None if columns == 21 else columns)
    scales = 'e4m3' if micro else None
    quant = functools.partial(fake_quant, scale_format=scales)
    found = rounded(quant, static_argnums=(1, 2))(x, form, group)
    wanted = oracle.quantise(x.astype(float), form, rows, columns, micro)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


T, S, H = 130, 70, 20


@functools.cache
def small():
  q, k, v = make(T, S, N=4, K=2, H=H, bias=2.0)
  seen = np.arange(S) <= np.arange(T)[:, None] - 40
  found = rounded(
    lambda *x: {
      name: sage_attention(*x, recipe=name, mask=masks.Causal(-40))
      for name in RECIPES
    },
  )(q, k, v)
  return (q, k, v), seen, found


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_equals_loops(name):
  (q, k, v), seen, found = small()
  np.testing.assert_array_equal(found[name][:, :40], 0)  # rows that see nothing
  exact = attention(q, k, v, mask=masks.Causal(-40))
  for n, kv in ((1, 0), (2, 1)):
    arrays = (q[0, :, n], k[0, :, kv], v[0, :, kv])
    arrays = (np.asarray(x, np.float64) for x in arrays)
    wanted = oracle.sage(*arrays, name, seen)
    error = relative(found[name][0, :, n], wanted)
    assert error < 2e-3  # of accumulators, which the loops have not
    assert error < 0.1 * relative(exact[0, :, n], wanted)


def test_smoothing_changes_no_probability():
  q, k, _ = make(bias=8.0)

  def map_of(k):
    s = jnp.einsum('btnh,bsnh->bnts', q, k, precision='highest') / 8
    return jax.nn.softmax(s)

  mean = k.mean(1, keepdims=True)
  assert jnp.abs(map_of(k) - map_of(k - mean)).max() < 1e-6


def test_smoothing_keys_mends_biased_ones():
  """AS p. 14 (A11): the error of P in INT8 falls from 0.046 to 0.013."""
  q, k, v = make(bias=7.0)
  exact = attention(q, k, v)
  p = jax.nn.softmax(jnp.einsum('btnh,bsnh->bnts', q, k) / 8)
  errors, outputs = [], []
  for smooth in (False, True):
    recipe = dataclasses.replace(RECIPES['sage1'], smooth_key=smooth)
    found = jax.nn.softmax(sage_logits(q, k, recipe) / 8)
    errors.append(relative(found, p))
    outputs.append(relative(sage_attention(q, k, v, recipe=recipe), exact))
  print(f'INT8 error of P: raw {errors[0]:.4f}, smoothed {errors[1]:.4f}')
  assert 0.03 < errors[0] < 0.07 and 0.009 < errors[1] < 0.018
  assert outputs[1] < 0.5 * outputs[0]


@functools.cache
def error(name, **changes):
  """Relative error of the output, queries and keys both biased."""
  q, k, v = make(bias=5.0)
  q = q + make(seed=1, bias=5.0)[1].mean(1, keepdims=True)
  recipe = dataclasses.replace(RECIPES[name], **changes)
  run = optimized(functools.partial(sage_attention, recipe=recipe))
  return relative(run(q, k, v), attention(q, k, v))


@pytest.mark.in_turn
def test_smoothing_both_makes_four_bits_usable():
  for name, largest in (('sage2', 0.2), ('sage3', 0.2)):
    whole = error(name)
    assert whole < largest
    assert whole < 0.6 * error(name, smooth_query=False)
    assert whole < 0.6 * error(name, smooth_key=False)


@pytest.mark.in_turn
def test_more_bits_err_less():
  assert error('sage1') < 0.5 * error('sage2')
  assert error('sage2', logits='int8') < 0.5 * error('sage2')
  # Finer groups: 4 and 16 tokens rather than a block.
  coarse = dict(query_group=(128, None), key_group=(64, None))
  assert error('sage2') < 0.95 * error('sage2', **coarse)


def test_two_levels_of_scale_beat_one_for_fp4():
  """Sage3: P in [0, 1] uses a corner of the range of E4M3 scales."""
  rng = np.random.default_rng(0)
  s = 2.5 * rng.standard_normal((1, 1, 64, 1024))
  p = jnp.asarray(np.exp(s - s.max(-1, keepdims=True)), jnp.float32)
  v = jnp.asarray(rng.standard_normal((1, 1024, 1, 16)) + 1, jnp.float32)
  exact = np.einsum('bnts,bsnv->bntv', *(np.asarray(x, float) for x in (p, v)))
  cosine, errors = [], []
  for two_level in (False, True):
    recipe = dataclasses.replace(RECIPES['sage3'], two_level=two_level)
    p_hat, v_hat, unit = round_weights(p, v, recipe)
    found = np.asarray(p_hat, float)
    errors.append(relative(found, p))
    cosine.append((found * p).sum() / np.linalg.norm(found) / np.linalg.norm(p))
    assert relative(jnp.einsum('bnts,bsnv->bntv', p_hat, v_hat), exact) < 0.2
    assert unit.size == 1
  print(f'FP4 error of P: direct {errors[0]:.3f}, two levels {errors[1]:.3f}')
  assert errors[1] < 0.9 * errors[0]
  assert cosine[1] > cosine[0] > 0.97


def test_two_levels_of_accumulation_beat_one():
  """Sage2: 13 bits of mantissa are enough for 64 keys, not for 4096."""
  rng = np.random.default_rng(0)
  p = jnp.asarray(rng.random((1, 1, 8, 4096)), jnp.float32)
  v = jnp.asarray(rng.standard_normal((1, 4096, 1, 8)) + 1, jnp.float32)
  exact = np.einsum('bnts,bsnv->bntv', *(np.asarray(x, float) for x in (p, v)))
  errors = {
    name: relative(accumulate(p, v, Recipe(**options)), exact)
    for name, options in {
      'float32': {},
      'two': dict(accumulator=(8, 13)),
      'one': dict(accumulator=(8, 13), flush=1 << 20),
    }.items()
  }
  assert errors['float32'] < 1e-6 < errors['two'] < 1e-4
  assert errors['one'] > 3 * errors['two']


def test_a_float16_accumulator_needs_narrow_factors():
  """Sage2++: 64 products of 448 by 448 do not fit, of 224 by 4.5 they do."""
  ones = jnp.ones((1, 1, 1, 64)), jnp.ones((1, 64, 1, 1))
  wide = dataclasses.replace(RECIPES['sage2++'], limits=(448.0, 448.0))
  for recipe, fits in ((RECIPES['sage2++'], True), (wide, False)):
    p, v, unit = round_weights(*ones, recipe)
    total = accumulate(p, v, recipe) * unit
    assert bool(jnp.isfinite(total).all()) == fits
    if fits:
      np.testing.assert_allclose(total, 64, rtol=1e-3)


def test_refusals():
  q, k, v = make(8, 8, H=16)
  with pytest.raises(ValueError, match="'sage9': pass one of sage1"):
    sage_attention(q, k, v, recipe='sage9')
  with pytest.raises(ValueError, match='N = 3 query heads cannot share K = 2'):
    sage_attention(*make(8, 8, N=3, H=16))
  with pytest.raises(ValueError, match="form = 'e3m2'"):
    fake_quant(q, 'e3m2', (1, 1, 1, 1))
  with pytest.raises(ValueError, match='one size for each axis'):
    fake_quant(q, 'int8', (1, 1))
  with pytest.raises(NotImplementedError, match='has no gradient'):
    jax.grad(lambda q: sage_attention(q, k, v).sum())(q)
