"""Compact softmax mixers: equations, counts, identities and misprints."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.config import ConfigError
from efficient_attn.models import cost
from tests.layers.compact_cases import (
  B,
  D,
  N,
  T,
  abstract,
  assert_close,
  build,
  flat,
  inputs,
  make,
  values,
)
from tests.oracles import compact as oracles

EQUATIONS = {
  'attention-gates': (
    oracles.mha,
    dict(gate='channel', qk_norm=True, sinks=True, rotary=dict(fraction=0.5)),
    dict(gate=True, fraction=0.5),
  ),
  'attention-head_gates': (
    oracles.mha,
    dict(gate='head', num_kv_heads=2),
    dict(gate=True),
  ),
  'window-gates': (
    oracles.mha,
    dict(gate='head', sinks=True, window=3),
    dict(gate=True, window=3),
  ),
  'mla': (oracles.mla, {}, {}),
  'mla-options': (
    oracles.mla,
    dict(q_rank=0, kv_rank=12, nope_dim=6, rope_dim=2, value_dim=10),
    {},
  ),
  'mfa': (oracles.mfa, {}, {}),
  'mfa-options': (oracles.mfa, dict(head_dim=10, q_rank=5), {}),
  'tpa': (oracles.tpa, {}, {}),
  'tpa-options': (
    oracles.tpa,
    dict(head_dim=6, q_rank=3, k_rank=1, v_rank=4),
    {},
  ),
  'differential': (oracles.differential, {}, {}),
  'differential-options': (
    oracles.differential,
    dict(num_kv_heads=2, lambda_init=0.3),
    dict(lambda_init=0.3),
  ),
}


@pytest.mark.parametrize('case', EQUATIONS)
def test_equations_with_and_without_cache(case):
  oracle, options, oracle_options = EQUATIONS[case]
  with jax.enable_x64(True):
    mixer, x = make(case.partition('-')[0], **options), inputs()

    @jax.jit
    def run(x):
      cache, parts = mixer.init_cache(B, T + 2, x.dtype), []
      for a, b in itertools.pairwise((0, T - 1, T)):
        y, cache = mixer(x[:, a:b], cache=cache)
        parts.append(y)
      return mixer(x)[0], jnp.concatenate(parts, axis=1)

    expected = oracle(values(mixer), x, heads=N, **oracle_options)
    for y in run(x):
      assert y.dtype == jnp.float64
      assert_close(y, expected)


def test_yarn_with_mscales_scales_the_logits_of_mla():
  scaling = dict(type='yarn', factor=8.0, mscale_all_dim=0.5, mscale=0.5)
  plain, scaled = (
    make('mla', rotary=dict(scaling=None if x is None else x)).options['scale']
    for x in (None, scaling)
  )
  np.testing.assert_allclose(scaled / plain, (0.05 * np.log(8) + 1) ** 2)


def test_mla_absorbed_equals_expanded():
  with jax.enable_x64(True):
    x, weight = inputs(), inputs(seed=1)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grads(mixer, x):
      y, _ = mixer(x)
      return jnp.sum(y * weight), y

    expanded, absorbed = (
      grads(make('mla', absorbed=form), x) for form in (False, True)
    )
    # The form without options is one of the two: the cheaper one.
    for a, b in zip(
      jax.tree.leaves(absorbed), jax.tree.leaves(expanded), strict=True
    ):
      assert_close(a, np.asarray(b), 1e-11)


@pytest.mark.parametrize('tokens', [1, T])
def test_mla_takes_the_cheaper_form(tokens):
  x = jnp.zeros((1, tokens, D))

  def flops(absorbed):
    mixer = make('mla', np.float32, absorbed=absorbed)
    cache = mixer.init_cache(1, T, x.dtype)
    return cost.flops(lambda x: mixer(x, cache=cache)[0], x)

  expanded, absorbed = flops(False), flops(True)
  assert flops(None) == min(expanded, absorbed)
  assert (absorbed < expanded) == (tokens == 1)


# Table 3 of Zhang et al.'s survey (2025): parameters, and cached numbers a
# token, of a layer with D = d_model, h heads of width d and the ranks r.
TABLE = {
  'mha': (
    lambda D, h, d: 4 * D * h * d,
    lambda h, d: 2 * h * d,
  ),
  'mqa': (
    lambda D, h, d: 2 * D * h * d + 2 * D * d,
    lambda h, d: 2 * d,
  ),
  'gqa': (
    lambda D, h, d, kv: 2 * D * h * d + 2 * D * kv * d,
    lambda h, d, kv: 2 * kv * d,
  ),
  'mla': (
    lambda D, h, d, r_q, r_kv, d_n, d_r: (
      D * (r_q + r_kv + d_r + h * d)
      + r_q * h * (d_n + d_r)
      + r_kv * h * (d_n + d)
    ),
    lambda h, d, r_q, r_kv, d_n, d_r: r_kv + d_r,
  ),
  'mfa': (
    lambda D, h, d: D * (3 * d + h * d) + h * d**2,
    lambda h, d: 2 * d,
  ),
  'tpa': (
    lambda D, h, d, r_q, r_k, r_v: D * (r_q + r_k + r_v) * (h + d) + D * h * d,
    lambda h, d, r_q, r_k, r_v: (r_k + r_v) * (h + d),
  ),
}
# method, D, h, d, the rest; with the numbers of the survey's own example.
ROWS = [
  ('mha', 64, 4, 16, {}, 16_384, 128),
  ('mha', 4096, 32, 128, {}, 67_108_864, 8192),
  ('mqa', 64, 4, 16, {}, 10_240, 32),
  ('mqa', 4096, 32, 128, {}, 34_603_008, 256),
  ('gqa', 64, 4, 16, dict(kv=2), 12_288, 64),
  ('gqa', 4096, 32, 128, dict(kv=8), 41_943_040, 2048),
  ('mla', 64, 4, 16, dict(r_q=24, r_kv=20, d_n=12, d_r=6), 11_264, 26),
  (
    'mla',
    4096,
    32,
    128,
    dict(r_q=1536, r_kv=512, d_n=128, d_r=64),
    39_059_456,
    576,
  ),
  ('mfa', 64, 4, 24, {}, 13_056, 48),
  ('mfa', 4096, 32, 128, {}, 18_874_368, 256),
  ('mfa', 4096, 32, 256, {}, 38_797_312, 512),
  ('tpa', 64, 4, 16, dict(r_q=6, r_k=2, r_v=3), 18_176, 100),
  ('tpa', 4096, 32, 128, dict(r_q=6, r_k=2, r_v=2), 23_330_816, 640),
]


def build_row(method, d_model, heads, head_dim, ranks):
  """Our module of a row of the table, without numbers."""
  options = dict(
    mha=lambda: ('attention', dict(head_dim=head_dim)),
    mqa=lambda: ('attention', dict(head_dim=head_dim, num_kv_heads=1)),
    gqa=lambda kv: ('attention', dict(head_dim=head_dim, num_kv_heads=kv)),
    mla=lambda r_q, r_kv, d_n, d_r: (
      'mla',
      dict(
        q_rank=r_q,
        kv_rank=r_kv,
        nope_dim=d_n,
        rope_dim=d_r,
        value_dim=head_dim,
      ),
    ),
    mfa=lambda: ('mfa', dict(head_dim=head_dim)),
    tpa=lambda r_q, r_k, r_v: (
      'tpa',
      dict(head_dim=head_dim, q_rank=r_q, k_rank=r_k, v_rank=r_v),
    ),
  )[method]
  name, options = options(**ranks)
  return abstract(name, d_model, heads, **options)


@pytest.mark.parametrize(
  'row', ROWS, ids=lambda row: '-'.join(map(str, row[:4]))
)
def test_parameters_and_cache_of_the_survey(row):
  method, d_model, heads, head_dim, ranks, parameters, cached = row
  formula, cache_formula = TABLE[method]
  assert formula(d_model, heads, head_dim, **ranks) == parameters
  assert cache_formula(heads, head_dim, **ranks) == cached

  mixer = build_row(method, d_model, heads, head_dim, ranks)
  sizes = {name: p.size for name, p in flat(mixer).items()}
  # What the table leaves out: the scales of the norms of the two latents.
  scales = {k: v for k, v in sizes.items() if k.endswith('.scale')}
  if method == 'mla':
    assert scales == {
      'query_norm.scale': ranks['r_q'],
      'kv_norm.scale': ranks['r_kv'],
    }
  else:
    assert not scales
  assert sum(sizes.values()) - sum(scales.values()) == parameters

  one, two = (
    jax.tree.leaves(jax.eval_shape(lambda m=m: mixer.init_cache(1, m, 'f4')))
    for m in (1, 2)
  )
  tokens = sum(leaf.size for leaf in two) - sum(leaf.size for leaf in one)
  assert tokens == cached


def test_tpa_of_rank_one_is_mqa():
  with jax.enable_x64(True):
    x = inputs()
    x[..., 0] = 1  # a channel to make factors of that do not depend on x
    mqa = make('attention', num_kv_heads=1)
    tpa = make('tpa', q_rank=N, k_rank=1, v_rank=1)

    def constant(p, value):
      p.set_value(jnp.zeros(p.shape).at[0].set(value))

    constant(tpa.query.heads.weight, N * jnp.eye(N))  # head i of rank i
    tpa.query.dims.weight.set_value(mqa.qkv.query.weight[...])
    for factors, p in ((tpa.key, mqa.qkv.key), (tpa.value, mqa.qkv.value)):
      constant(factors.heads.weight, 1.0)
      factors.dims.weight.set_value(p.weight[...])
    tpa.out.weight.set_value(mqa.out.weight[...])
    expected, y = jax.jit(lambda x: (mqa(x)[0], tpa(x)[0]))(x)
    assert_close(y, expected)


def test_mfa_is_mqa_with_factorised_queries():
  with jax.enable_x64(True):
    x = inputs()
    mfa = make('mfa', head_dim=10, q_rank=6)
    mqa = make('attention', head_dim=10, num_kv_heads=1)
    down, up = mfa.query.down.weight[...], mfa.query.up.weight[...]
    mqa.qkv.query.weight.set_value(jnp.tensordot(down, up, 1))
    for p, q in ((mqa.qkv.key, mfa.key), (mqa.qkv.value, mfa.value)):
      p.weight.set_value(q.weight[...][:, None])
    mqa.out.weight.set_value(mfa.out.weight[...])
    expected, y = jax.jit(lambda x: (mqa(x)[0], mfa(x)[0]))(x)
    assert_close(y, expected)


MISPRINTS = {
  # eqs. 24, 26, 30, 33: K (x) 1 where 1 (x) K is meant, head by head
  'attention-mqa': (oracles.mha, dict(num_kv_heads=1), dict(printed=True)),
  'attention-gqa': (oracles.mha, dict(num_kv_heads=2), dict(printed=True)),
  'mla': (oracles.mla, {}, dict(printed=True)),
  'mfa': (oracles.mfa, {}, dict(printed=True)),
  # eq. 32: W^down twice; only square matrices have such a product
  'mfa-down_twice': (
    oracles.mfa,
    dict(head_dim=D // N, q_rank=D),
    dict(down_twice=True),
  ),
}


@pytest.mark.parametrize('case', MISPRINTS)
def test_the_survey_misprints(case):
  oracle, options, misprint = MISPRINTS[case]
  with jax.enable_x64(True):
    mixer, x = make(case.partition('-')[0], **options), inputs()
    y, _ = jax.jit(mixer)(x)
    p = values(mixer)
  assert_close(y, oracle(p, x, heads=N))
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    assert_close(y, oracle(p, x, heads=N, **misprint), 0.1)


@pytest.mark.parametrize(
  'path', ['attention.qkv.key.weight', 'mfa.key.weight', 'tpa.key.dims.weight']
)
def test_down_projections_have_the_width_of_the_model(path):
  # The text of its section 5 prints h d rows, which is not d_model where heads
  # are wider.
  name, _, path = path.partition('.')
  assert flat(abstract(name, head_dim=16))[path].shape[0] == D
  with pytest.raises(ValueError, match='mismatch'):
    inputs() @ np.zeros((N * 16, 16))


def test_lambda_of_differential_attention():
  init = models.jit_init(lambda: build('differential', 1024, 1))
  w = init().weights
  for p in (w.lambda_q1, w.lambda_k1, w.lambda_q2, w.lambda_k2):
    assert p.shape == (512,) and not p.weight_decay
    assert abs(np.std(p[...]) - 0.1) < 0.02
  for p in (w.lambda_q1, w.lambda_q2):
    p.set_value(jnp.zeros(512))
  assert w.factor() == pytest.approx(0.8)
  with pytest.raises(ConfigError, match='head_dim=5 must be even'):
    abstract('differential', head_dim=5)


def test_gates_have_names():
  with pytest.raises(ConfigError, match="gate='heads' is unknown"):
    abstract('attention', gate='heads')
