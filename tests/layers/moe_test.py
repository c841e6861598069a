"""Mixtures of experts against an oracle, alone and on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.capture import captured
from efficient_attn.layers.context import Context
from efficient_attn.layers.ffn import ACTIVATIONS
from efficient_attn.layers.ffns import FFNS, read_ffn_options
from efficient_attn.layers.router import Routing
from efficient_attn.models import cost
from tests.layers.built import filled
from tests.oracles import experts as oracle

B, T, D, F, E = 4, 5, 8, 12, 8
CASES = {
  'mixtral': (dict(), dict()),
  'olmoe': (dict(top_k=3), dict(normalize=False)),
  'deepseek_v2': (
    dict(top_k=3, shared_dim=16),
    dict(normalize=False, scale=1.5, groups=4, top_groups=2),
  ),
  'deepseek_v3': (
    dict(top_k=3, shared_dim=16),
    dict(
      scores='sigmoid',
      correction=True,
      scale=2.5,
      groups=4,
      top_groups=2,
      group_best=2,
    ),
  ),
  'qwen3_next': (dict(top_k=4, shared_dim=16, shared_gate=True), dict()),
  'gpt_oss': (
    dict(bias=True, limit=0.7, offset=1.0, activation='quick_gelu'),
    dict(bias=True),
  ),
  'switch': (
    dict(top_k=1, expert='mlp', activation='relu'),
    dict(normalize=False),
  ),
  'all': (dict(top_k=E, expert='mlp', bias=True), dict()),
}
of_each_case = pytest.mark.parametrize('name', CASES)


@functools.cache
def make(name, dtype=np.float32, **routing):
  options, own = CASES[name]
  options = dict(num_experts=E, bias=False, activation='silu') | options
  activation = ACTIVATIONS[options.pop('activation')]

  def build():
    return FFNS['moe'](
      D,
      F,
      activation,
      router=Routing(**own | routing),
      rngs=nnx.Rngs(0),
      **options,
    )

  made = filled(build, dtype)
  made.router.weight[...] *= 5  # decided
  return made


def inputs(dtype=np.float64, rows=B):
  rng = np.random.default_rng(1)
  return rng.standard_normal((rows, T, D)).astype(dtype)


def array(p):
  return np.asarray(p[...], np.float64)


def logits_of(moe, x):
  logits = x @ array(moe.router.weight)
  return logits if moe.router.bias is None else logits + array(moe.router.bias)


def choices(moe, x):
  correction = moe.router.correction
  correction = 0 if correction is None else array(correction)
  return [
    oracle.choose(z, moe.router.top_k, moe.router.routing, correction)
    for z in logits_of(moe, x)
  ]


def dense(moe, x, chosen, xp=np):
  """Every expert of every token, in float64; `chosen` fixes which count."""
  act = moe.activation

  def linear(layer, e, x):
    y = x @ layer.weight[...][e]
    return y if layer.bias is None else y + layer.bias[...][e]

  def expert(e, x):
    up = linear(moe.up, e, x)
    if moe.gate is None:
      return linear(moe.down, e, act(up))
    gate = linear(moe.gate, e, x)
    if moe.limit:
      gate = xp.minimum(gate, moe.limit)
      up = xp.clip(up, -moe.limit, moe.limit)
    return linear(moe.down, e, act(gate) * (up + moe.offset))

  def extra(x):
    if moe.shared is None:
      return 0
    s = moe.shared
    y = act(x @ s.gate.weight[...]) * (x @ s.up.weight[...])
    y = y @ s.down.weight[...]
    if moe.shared_gate is not None:
      y = y / (1 + xp.exp(-(x @ moe.shared_gate.weight[...])))
    return y

  return expert, extra


@of_each_case
def test_outputs_are_those_of_the_oracle(name):
  with jax.enable_x64(True):
    moe = make(name, np.float64)
    x = inputs()
    y = jax.jit(lambda m, x: m(x))(moe, x)
    assert y.dtype == jnp.float64
    flat = x.reshape(-1, D)
    expert, extra = dense(moe, flat, None)
    wanted = oracle.mixture(flat, choices(moe, flat), expert)
    wanted = wanted + extra(flat)
  assert len({e for pairs in choices(moe, flat) for e, _ in pairs}) > 4
  np.testing.assert_allclose(y.reshape(-1, D), wanted, rtol=1e-9, atol=1e-10)


@of_each_case
def test_every_gradient_is_that_of_all_experts_masked(name):
  """The choice held fixed, a sum over all experts by weights of 0 or more."""
  with jax.enable_x64(True):
    moe = make(name, np.float64)
    graphdef, params = nnx.split(moe)
    x, dy = inputs(), inputs()[::-1]
    chosen = np.zeros((B * T, E))
    for t, pairs in enumerate(choices(moe, x.reshape(-1, D))):
      chosen[t, [e for e, _ in pairs]] = 1
    routing = moe.router.routing

    def by_hand(params, x):
      moe = nnx.merge(graphdef, params)
      flat = x.reshape(-1, D)
      logits = flat @ moe.router.weight[...]
      if moe.router.bias is not None:
        logits = logits + moe.router.bias[...]
      score = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}
      weights = score[routing.scores](logits) * chosen
      if routing.normalize:
        weights = weights / weights.sum(1, keepdims=True)
      expert, extra = dense(moe, flat, chosen, jnp)
      y = sum(
        routing.scale * weights[:, e, None] * expert(e, flat) for e in range(E)
      )
      return jnp.sum((y + extra(flat)) * dy.reshape(-1, D))

    def ours(params, x):
      return jnp.sum(nnx.merge(graphdef, params)(x) * dy)

    found = jax.jit(jax.grad(ours, (0, 1)))(params, x)
    wanted = jax.jit(jax.grad(by_hand, (0, 1)))(params, x)
  leaves = zip(
    jax.tree.leaves_with_path(found), jax.tree.leaves(wanted), strict=True
  )
  for (path, a), b in leaves:
    path = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=path)
    assert np.abs(b).max() > 0 or 'correction' in path


def loss(moe, x, segment_ids):
  context = Context(segment_ids=segment_ids)
  run = captured(moe, 'penalty', 'expert_load')
  y, found = run(x, context)
  (penalty,), (loads,) = found['penalty'], found['expert_load']
  weight = jnp.cos(jnp.arange(D))
  return jnp.sum(y * weight) + penalty, (y, penalty, loads)


@pytest.mark.parametrize(
  'name,mesh',
  [
    ('deepseek_v3', 'fsdp=8'),
    ('gpt_oss', 'data=2,fsdp=2,tensor=2'),
    ('qwen3_next', 'tensor=4,data=2'),
  ],
)
def test_sharded_equals_unsharded(name, mesh):
  moe = make(name, balance_weight=0.3, z_weight=0.1)
  x = jnp.asarray(inputs(np.float32, rows=8))
  segment_ids = jnp.ones((8, T), jnp.int32).at[:, -1].set(0)
  grad = jax.grad(loss, (0, 1), has_aux=True)
  plain = jax.jit(grad)(moe, x, segment_ids)
  with jax.set_mesh(sharding.make_mesh(mesh)):
    graphdef, params = nnx.split(moe)

    def place(p):
      return jax.sharding.reshard(p, sharding.param_spec(p.axes))

    params = nnx.from_flat_state(
      [(path, p.replace(place(p))) for path, p in nnx.to_flat_state(params)]
    )
    x, segment_ids = (
      jax.sharding.reshard(
        a, sharding.activation_spec(('batch',) + (None,) * (a.ndim - 1))
      )
      for a in (x, segment_ids)
    )
    moe = nnx.merge(graphdef, params)
    sharded = jax.jit(grad)(moe, x, segment_ids)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(plain), jax.tree.leaves(sharded), strict=True
  ):
    np.testing.assert_allclose(
      a, b, atol=2e-5, rtol=1e-4, err_msg=jax.tree_util.keystr(path)
    )


@of_each_case
def test_penalties_and_loads_count_real_tokens(name):
  moe = make(name, balance_weight=0.5, z_weight=0.25)
  x = inputs(np.float32)
  segment_ids = jnp.asarray([[1] * T, [0] * T, [0, 0, 1, 1, 1], [2] * T])
  _, (_, penalty, loads) = jax.jit(loss)(moe, x, segment_ids)
  flat = x[np.asarray(segment_ids) != 0].astype(np.float64)
  chosen = choices(moe, flat)
  counts = np.zeros(E)
  for pairs in chosen:
    counts[[e for e, _ in pairs]] += 1
  np.testing.assert_array_equal(loads, counts)
  score = dict(softmax=oracle.softmax, sigmoid=oracle.sigmoid)
  score = score[moe.router.routing.scores]
  logits = logits_of(moe, flat)
  shares = np.stack([score(z) / score(z).sum() for z in logits])
  balance = E * (counts / len(flat) * shares.mean(0)).sum()
  z = np.square(np.log(np.exp(logits).sum(1))).mean()
  np.testing.assert_allclose(penalty, 0.5 * balance + 0.25 * z, rtol=1e-5)


def test_no_token_depends_on_another():
  """Bit for bit: neither the batch, nor what is later, nor padding."""
  moe = make('deepseek_v3')
  run = jax.jit(lambda x: moe(x))
  x = inputs(np.float32)
  whole = run(x)
  for rows, tokens in ((slice(0, 1), slice(0, T)), (slice(0, B), slice(0, 3))):
    other = 10 * x[::-1, ::-1]
    mixed = other.copy()
    mixed[rows, tokens] = x[rows, tokens]
    np.testing.assert_array_equal(run(mixed)[rows, tokens], whole[rows, tokens])


def test_flops_by_hand():
  """The products of the chosen experts, forward and backward."""
  moe = make('mixtral')
  x = jnp.asarray(inputs(np.float32))
  router, chosen = 2 * B * T * D * E, 2 * 3 * (B * T * 2) * D * F
  assert cost.flops(lambda m, x: m(x), moe, x) == router + chosen
  gradient = jax.grad(lambda m, x: m(x).sum(), (0, 1))
  assert cost.flops(gradient, moe, x) == 3 * (router + chosen)
  assert cost.count(lambda m, x: m(x), moe, x).flops == router + chosen


@pytest.mark.parametrize(
  'options,message',
  [
    (dict(top_k=9), 'top_k=9 exceeds the 8 experts'),
    (dict(router=dict(groups=3)), 'router.groups=3 does not divide'),
    (
      dict(router=dict(groups=4, top_groups=5)),
      'router.top_groups=5 exceeds router.groups=4',
    ),
    (
      dict(router=dict(groups=8, top_groups=8, group_best=2)),
      'router.group_best=2 exceeds the 1 experts',
    ),
    (
      dict(top_k=3, router=dict(groups=4)),
      'top_k=3 exceeds the 2 experts to choose from',
    ),
    (
      dict(router=dict(scores='sotfmax')),
      "ffns.moe.router.scores='sotfmax' is unknown; did you mean 'softmax'",
    ),
    (dict(expert='gul'), "ffns.moe.expert='gul' is unknown"),
    (dict(num_experts=0), 'ffns.moe.num_experts=0 must be >= 1'),
  ],
)
def test_choices_that_do_not_exist(options, message):
  with pytest.raises(ConfigError, match=message):
    options = read_ffn_options('moe', options, 'ffns.moe')
    FFNS['moe'](D, F, jax.nn.silu, rngs=nnx.Rngs(0), **options)
