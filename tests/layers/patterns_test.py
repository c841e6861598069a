"""Mixers with sparse patterns against their rules, and against attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.context import Context
from efficient_attn.ops import masks
from tests.layers.built import built
from tests.oracles import attention as oracle
from tests.oracles import patterns

B, T, D, N = 2, 24, 32, 4


def make(name, *, causal=True, **options):
  return built(name, d_model=D, num_heads=N, causal=causal, **options)


def inputs(length=T, seed=7):
  return jax.random.normal(jax.random.key(seed), (B, length, D))


def run(mixer, x, context=None):
  return jax.jit(lambda x: mixer(x, context)[0])(x)


def tile_order(height, width, tile):
  """The rule of sliding tiles on places of a plane."""
  plane = patterns.cells((height, width))
  cells = [(y // tile, x // tile) for y, x in plane]
  near = patterns.nearest

  def admitted(b, n, q, k):
    (i, j), (y, x) = cells[q], cells[k]
    return y in near(height // tile, 3, i) and x in near(width // tile, 3, j)

  return admitted


def bigbird(causal):
  random = masks.random_blocks(6, 1, seed=0, causal=causal)
  ends = (0,) if causal else (0, 5)

  def admitted(b, n, q, k):
    i, j = q // 4, k // 4
    return abs(i - j) <= 1 or i in ends or j in ends or random[i, j]

  return admitted


def moa(b, n, q, k):
  return q - k < 3 + (0, 1, 2, 4)[n] * (q + 1) // 4 or k < 2


# Options and the rule: of a decoder joined with causality.
CASES = {
  'sparse_transformer fixed': (
    dict(kind='fixed', stride=5, summary=2),
    patterns.fixed(5, 2),
  ),
  'sparse_transformer strided': (
    dict(kind='strided', stride=5),
    patterns.strided(5),
  ),
  'logsparse': (dict(local=3), patterns.logsparse(3)),
  'star': ({}, lambda b, n, q, k: abs(q - k) <= 1 or 0 in (q, k)),
  'cascade': (dict(base=1, level=2), lambda b, n, q, k: abs(q - k) <= 3),
  'longformer': (
    dict(window=4, num_global=2),
    lambda b, n, q, k: abs(q - k) <= 2 or min(q, k) < 2,
  ),
  'longformer dilated': (
    dict(window=4, dilation=3, num_global=0),
    patterns.dilated(2, 2, 3),
  ),
  'bigbird ITC': (dict(block_size=4, num_random=1), bigbird(True)),
  'bigbird ETC': (
    dict(block_size=4, num_random=0, num_global=3),
    lambda b, n, q, k: abs(q // 4 - k // 4) <= 1 or min(q, k) < 3,
  ),
  'moa': (dict(alpha=3, beta=(0, 0.25, 0.5, 1), num_sinks=2), moa),
  'adaptive_span': (
    dict(window=9, ramp=1, span=4 / 9),
    lambda b, n, q, k: abs(q - k) <= 4,
  ),
}
ENCODERS = {
  name: case for name, case in CASES.items() if name.split()[0] != 'moa'
} | {
  'bigbird ITC': (dict(block_size=4, num_random=1), bigbird(False)),
  'blockbert': (
    dict(num_blocks=3),
    lambda b, n, q, k: k // 8 == (q // 8 + n % 3) % 3,
  ),
  'neighborhood plane': (
    dict(window=3),
    patterns.neighborhood((4, 6), (3, 3)),
  ),
  'neighborhood line': (dict(window=4), patterns.neighborhood((T,), (4,))),
  'sliding_tile plane': (dict(tile=2), tile_order(8, 8, 2)),
  'radial': (dict(min_width=1), patterns.radial(4)),
  'radial wide': (dict(min_width=2), patterns.radial(4, 2)),
}
ENCODERS['sliding_tile line'] = (
  dict(tile=2),
  lambda b, n, q, k: k // 2 in patterns.nearest(12, 3, q // 2),
)
# Of the mixers that need one, by default the line of all tokens.
GRIDS = {
  'neighborhood plane': (4, 6),
  'sliding_tile plane': (8, 8),
  'radial': (6, 4),
  'radial wide': (6, 4),
}


def grid_of(name):
  on_grid = name.split()[0] in ('neighborhood', 'sliding_tile', 'radial')
  return Context(grid=GRIDS.get(name, (T,) if on_grid else ()))


@pytest.mark.parametrize(
  'name, causal',
  [(name, True) for name in CASES] + [(name, False) for name in ENCODERS],
)
def test_follows_the_rule_of_its_paper(name, causal):
  options, rule = (CASES if causal else ENCODERS)[name]
  mixer = make(name.split()[0], causal=causal, position='none', **options)
  x = inputs(int(np.prod(GRIDS.get(name, (T,)))))
  query, key, value = mixer.project(x, Context(), None)
  admitted = oracle.admitted(
    lambda b, n, q, k: rule(b, n, q, k) and (k <= q or not causal),
    (B, N, x.shape[1], x.shape[1]),
  )
  assert not admitted.all()
  o, _ = oracle.attention(query, key, value, admitted)
  expected = np.einsum('btnh,nhd->btd', o, mixer.out.weight[...])
  found = run(mixer, x, grid_of(name))
  np.testing.assert_allclose(found, expected, atol=2e-5)
  tiled = make(
    name.split()[0],
    causal=causal,
    position='none',
    implementation='blockwise',
    **options,
  )
  found = run(tiled, x, grid_of(name))
  np.testing.assert_allclose(found, expected, atol=2e-5)


# What makes a mixer see everything.
EVERYTHING = {
  'sparse_transformer': dict(stride=T, summary=1),
  'logsparse': dict(local=T),
  'cascade': dict(base=T),
  'longformer': dict(window=2 * T),
  'bigbird': dict(block_size=T),
  'neighborhood': dict(window=T),
  'sliding_tile': dict(tile=4, window=6),
  'radial': {},
  'blockbert': dict(num_blocks=1),
  'adaptive_span': dict(window=2 * T, span=1.0),
  'duo': dict(window=T),
  'moa': dict(alpha=T),
  'dam': {},
  'entmax': {},
}


@pytest.mark.parametrize('name', EVERYTHING)
def test_with_room_for_everything_it_is_attention(name):
  encoder = name in ('neighborhood', 'sliding_tile', 'radial', 'blockbert')
  mixer = make(name, causal=not encoder, position='none', **EVERYTHING[name])
  plain = make('attention', causal=not encoder, position='none')
  if name == 'entmax':  # alpha = 1: softmax
    mixer.weights.alpha.set_value(jnp.full(N, -200.0))
  x = inputs()
  expected = run(plain, x)
  context = Context(grid=(1, T)) if name == 'radial' else grid_of(name)
  np.testing.assert_allclose(run(mixer, x, context), expected, atol=2e-6)
  # Not because nothing is left out anyway.
  assert np.std(expected) > 0.1


def test_star_of_three_is_attention():
  x = inputs(3)
  expected = run(make('attention'), x)
  np.testing.assert_allclose(run(make('star'), x), expected, atol=2e-6)


def test_longformer_with_global_projections():
  options = dict(window=4, num_global=2, position='none', causal=False)
  mixer = make('longformer', global_projections=True, **options)
  x = inputs()
  rule = ENCODERS['longformer'][1]
  shape = (B, N, T, T)
  local = oracle.admitted(lambda *at: at[2] >= 2 and rule(*at), shape)
  first = oracle.admitted(lambda b, n, q, k: q < 2, shape)
  o = sum(
    oracle.attention(*mixer.project(x, Context(), None, qkv), admitted)[0]
    for qkv, admitted in ((mixer.qkv, local), (mixer.global_qkv, first))
  )
  expected = np.einsum('btnh,nhd->btd', o, mixer.out.weight[...])
  np.testing.assert_allclose(run(mixer, x), expected, atol=2e-5)
  # Each segment has global tokens of its own.
  ids = jnp.asarray(np.repeat([1, 2, 3], [9, 1, 14]))[None].repeat(B, 0)
  found = run(mixer, x, Context(segment_ids=ids))
  for start, stop in ((0, 9), (9, 10), (10, T)):
    alone = run(mixer, x[:, start:stop])
    np.testing.assert_allclose(found[:, start:stop], alone, atol=2e-6)
  with pytest.raises(ConfigError, match='needs causal=False'):
    make('longformer', global_projections=True)
  with pytest.raises(NotImplementedError, match='no cache'):
    mixer.init_cache(B, T, jnp.float32)


def test_duo_gates_mix_full_and_streaming():
  mixer = make('duo', window=5, num_sinks=2, num_kv_heads=2, position='none')
  mixer.alpha.set_value(jnp.array([0.25, 1.75]))
  x = inputs()
  heads = mixer.project(x, Context(), None)
  shape = (B, N, T, T)
  full, streaming = (
    oracle.attention(*heads, oracle.admitted(rule, shape))[0]
    for rule in (lambda b, n, q, k: k <= q, patterns.streaming(2, 5))
  )
  share = np.array([0.25, 0.25, 1, 1])[:, None]  # of 1.75, clipped
  expected = share * full + (1 - share) * streaming
  expected = np.einsum('btnh,nhd->btd', expected, mixer.out.weight[...])
  np.testing.assert_allclose(run(mixer, x), expected, atol=2e-5)
  graphdef, params = nnx.split(mixer)

  def loss(params):
    return jnp.sum(nnx.merge(graphdef, params)(x)[0] ** 2)

  gradient = jax.jit(jax.grad(loss))(params)['alpha'][...]
  assert (gradient != 0).all()  # also of the one that is clipped


@pytest.mark.in_turn
def test_duo_as_deployed():
  options = dict(window=5, num_sinks=3, num_kv_heads=4)
  mixer = make('duo', full_heads=2, **options)
  gated = make('duo', **options)
  nnx.update(gated, nnx.state(mixer))
  gated.alpha.set_value(jnp.array([1.0, 1.0, 0.0, 0.0]))
  x = inputs()
  expected = run(gated, x)
  np.testing.assert_allclose(run(mixer, x), expected, atol=2e-6)
  # Streaming heads keep 3 + 4 tokens of two heads, whatever the length.
  sizes = [
    sum(
      leaf.size for leaf in jax.tree.leaves(mixer.init_cache(1, m, 'float32'))
    )
    for m in (100, 200)
  ]
  assert sizes[1] - sizes[0] == 2 * 100 * 2 * 8
  assert sizes[0] == 2 * (100 * 2 * 8 + 2 * (3 + 4) * 8) + 2

  @jax.jit
  def step(x, cache):
    return mixer(x, cache=cache)

  for cuts in ((2, 3, 4, 11, 12), (1, 9), (13, 14, 15, 16)):
    cache, parts = mixer.init_cache(B, T, x.dtype), []
    for a, b in zip((0, *cuts), (*cuts, T), strict=True):
      y, cache = step(x[:, a:b], cache)
      parts.append(y)
    np.testing.assert_allclose(
      jnp.concatenate(parts, axis=1), expected, atol=2e-6
    )
  mesh = sharding.make_mesh('data=2,tensor=2', jax.devices()[:4])
  with jax.set_mesh(mesh):
    found = jax.jit(lambda x: mixer(x)[0])(x)
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_adaptive_span_learns_its_span():
  mixer = make('adaptive_span', window=16, ramp=4, span=0.3)
  x = inputs()
  graphdef, params = nnx.split(mixer)

  def loss(params):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

  gradient = jax.jit(jax.grad(loss))(params)['mask_rule']['span'][...]
  loss = jax.jit(loss)
  for n in range(N):
    values = []
    for step in (1e-2, -1e-2):
      moved = jax.tree.map(lambda p: p, params)
      span = moved['mask_rule']['span']
      span.set_value(span[...].at[n].add(step))
      values.append(loss(moved))
    difference = (values[0] - values[1]) / 2e-2
    np.testing.assert_allclose(gradient[n], difference, rtol=0.05, atol=0.02)
  # A parameter that left [0, 1] counts as the border, and comes back.
  outside = make('adaptive_span', window=16, ramp=4, span=-0.5)
  border = make('adaptive_span', window=16, ramp=4, span=0.0)
  np.testing.assert_allclose(run(outside, x), run(border, x), atol=2e-6)


def test_dam():
  mixer = make('dam', reach=4, causal=False, position='none')
  x = inputs()
  alpha = np.ones((9, N))
  alpha[6, 1] = -0.5  # keys 2 after the query, for head 1
  alpha[8, 2] = -3.0  # keys 4 or more after the query, for head 2
  mixer.alpha.set_value(jnp.asarray(alpha, jnp.float32))

  def rule(b, n, q, k):
    if {q, k} & {0, T - 1}:
      return True
    return not (n == 1 and k - q == 2 or n == 2 and k - q >= 4)

  admitted = oracle.admitted(rule, (B, N, T, T))
  o, _ = oracle.attention(*mixer.project(x, Context(), None), admitted)
  expected = np.einsum('btnh,nhd->btd', o, mixer.out.weight[...])
  np.testing.assert_allclose(run(mixer, x), expected, atol=2e-5)
  graphdef, params = nnx.split(mixer)

  def loss(params):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

  # Those that are left have a gradient.
  gradient = jax.jit(jax.grad(loss))(params)['alpha'][...]
  assert np.count_nonzero(gradient) == 9 * N - 2
  # With noise every diagonal may be there.
  noisy = [mixer.table(jax.random.key(i)) for i in (0, 0, 1)]
  assert np.isfinite(noisy[0]).all()
  np.testing.assert_array_equal(noisy[0], noisy[1])
  assert (noisy[0] != noisy[2]).all()


def test_entmax_weighs_less_than_everything():
  mixer = make('entmax', position='none')
  mixer.qkv.query.weight.set_value(20 * mixer.qkv.query.weight[...])
  x = inputs()
  graphdef, params = nnx.split(mixer)
  seen = jnp.zeros((B, T, D)).at[:, -1].set(1)

  def loss(x):
    return jnp.sum(seen * mixer(x)[0])

  # A token without weight changes nothing.
  gradient = jax.jit(jax.grad(loss))(x)
  quiet = np.all(gradient == 0, axis=-1).sum()
  assert 0 < quiet < B * (T - 1)

  def value(params):
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)[0]))

  assert (jax.jit(jax.grad(value))(params)['weights']['alpha'][...] != 0).all()


def test_cosine_attention_has_a_temperature_of_at_most_a_hundred():
  mixer = make('attention', cosine=True, position='none', causal=False)
  log_scale = np.array([-1.0, 0.5, np.log(100.0), 9.0], np.float32)
  mixer.query_norm.log_scale.set_value(jnp.asarray(log_scale))
  x = inputs()
  (query, key, value), _ = mixer.qkv(x)
  query, key = (
    np.asarray(h) / np.linalg.norm(h, axis=-1, keepdims=True)
    for h in (query, key)
  )
  query = query * np.exp(log_scale).clip(max=100)[:, None]
  everything = np.ones((B, N, T, T), bool)
  o, _ = oracle.attention(query, key, value, everything, scale=1.0)
  expected = np.einsum('btnh,nhd->btd', o, mixer.out.weight[...])
  np.testing.assert_allclose(run(mixer, x), expected, atol=2e-4)


@pytest.mark.parametrize(
  'name, options, grid, message',
  [
    ('neighborhood', {}, (4, 5), r'T is 24 but grid=\(4, 5\)'),
    ('neighborhood', dict(window=(3, 3)), (T,), 'one for each'),
    ('radial', {}, (), 'needs a grid'),
    ('sliding_tile', dict(tile=5), (T,), 'does not divide the grid'),
    ('sliding_tile', dict(tile=(2, 2)), (T,), 'one number for all axes'),
    ('blockbert', dict(num_blocks=5), (), 'no multiple of num_blocks=5'),
  ],
)
def test_grids_that_do_not_fit(name, options, grid, message):
  mixer = make(name, causal=False, **options)
  with pytest.raises(ConfigError, match=message):
    mixer(inputs(), Context(grid=grid))


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('blockbert', dict(shifts=(0, 1)), 'one for each of num_heads=4'),
    ('blockbert', dict(position='alibi'), "'alibi' is unknown"),
    ('neighborhood', dict(grid=(4, 6)), 'the model hands its grid down'),
    ('attention', dict(rotary_base=1e6), 'it is rotary.base now'),
    ('sparse_transformer', dict(kind='fixd'), "did you mean 'fixed'"),
    ('sparse_transformer', dict(stride=4), 'summary=8 must be between'),
    ('moa', dict(alpha=(1, 2)), 'one for each of num_heads=4'),
    ('moa', dict(beta=-0.5), 'not negative'),
    ('duo', dict(full_heads=4), 'less than the 4 kv heads'),
    ('duo', dict(sinks=True), 'not an option of duo'),
    ('entmax', dict(logits_soft_cap=3.0), 'not an option of entmax'),
    ('attention', dict(cosine=True, qk_norm=True), 'set qk_norm=False'),
  ],
)
def test_options_that_make_no_sense(name, options, message):
  encoder = name in ('neighborhood', 'sliding_tile', 'blockbert')
  with pytest.raises(ConfigError, match=message):
    make(name, causal=not encoder, **options)


def test_bigbird_of_an_encoder_refuses_packed_rows():
  ids = jnp.zeros((B, T), jnp.int32)
  with pytest.raises(NotImplementedError, match='bidirectional BigBird'):
    make('bigbird', causal=False)(inputs(), Context(segment_ids=ids))
