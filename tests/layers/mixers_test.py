"""Properties of every row of MIXERS; a new row cannot skip them."""

import contextlib
import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.mixer import OnGrid
from efficient_attn.layers.mixers import (
  FAMILIES,
  MIXERS,
  build_mixer,
  mixer_options,
)
from efficient_attn.layers.rotary import Rotary
from efficient_attn.layers.stack import Stack

B, T, D, N = 4, 24, 32, 4

# What makes the small shapes here meaningful, for the rows that have it.
SMALL = {
  'alpha': 3,
  'base': 3,
  'block_size': 4,
  'chunk_size': 8,
  'cluster_size': 12,
  'compress_size': 4,
  'compress_stride': 2,
  'compressed_len': 3,
  'cube': (2, 2),
  'max_blocks': 6,
  'mem_len': 8,
  'min_width': 1,
  'num_buckets': 4,
  'num_clusters': 4,
  'num_landmarks': 8,
  'num_random': 1,
  'num_sinks': 2,
  'ramp': 2,
  'stride': 4,
  'summary': 1,
  'tile': 2,
  'top_k': 4,
  'window': 5,
}

# How many tokens one sees in an encoder, where it is not all of them.
REACH = {'base_conv': 5, 'gated_conv': 5}

# Every row, and further options worth the same tests.
CASES = [
  (name, {k: v for k, v in SMALL.items() if k in mixer_options(name)})
  for name in MIXERS
]
OPTIONS = [
  ('attention', dict(num_kv_heads=2, qk_norm=True, implementation='blockwise')),
]
# Options for the exhaustive sweep.
MORE = [
  ('gla', dict(chunk_size=16, conv_width=4)),
  ('deltanet', dict(chunk_size=8, negative_eigenvalues=True, conv_width=0)),
  ('attention', dict(num_kv_heads=1, gate='channel', sinks=True)),
  ('attention', dict(position='alibi', logits_soft_cap=5.0)),
  ('attention', dict(gate='head', rotary=Rotary(fraction=0.5))),
  ('attention', dict(position='t5')),
  ('attention', dict(qkv_bias=True, out_bias=True)),
  ('attention', dict(cosine=True, num_kv_heads=2)),
  ('sparse_transformer', dict(kind='strided', stride=4)),
  ('bigbird', dict(block_size=4, num_random=1, num_global=2)),
  ('neighborhood', dict(window=3)),
  ('mla', dict(absorbed=True)),
  ('mla', dict(position='none')),
  ('differential', dict(num_kv_heads=2, gate='head', qk_norm=True)),
  ('window', dict(window=1)),
  ('path', dict(chunk_size=8, forget_gate=True)),
  ('performer', dict(chunk_size=8, hyperbolic=True)),
  ('rfa', dict(chunk_size=8, gate=True)),
  ('lightning', dict(chunk_size=8, decay=False, head_dim=6)),
  (
    'lightning',
    dict(chunk_size=8, rates='linear', silu_values=False, norm_scale=False),
  ),
  ('cosformer', dict(chunk_size=8, max_length=4096)),
  ('slstm', dict(shared_norm=True)),
  ('ttt_linear', dict(chunk_size=8, mean_gradient=False, gate=True)),
  ('lact', dict(chunk_size=8, window=5, rank=0)),
  ('sana', dict(chunk_size=8, qk_norm=True)),
  ('qt_vit', dict(chunk_size=8, compact=False)),
  (
    'deltaproduct',
    dict(chunk_size=8, num_steps=3, forget_gate=False, key_dim=6, value_dim=5),
  ),
  ('comba', dict(chunk_size=8, rule='gated_delta', output_gate='silu')),
  ('gated_deltanet', dict(chunk_size=8, key_heads=2, key_dim=6)),
  ('kda', dict(chunk_size=8, key_heads=1, value_dim=6, gate_bias=True)),
  ('rg_lru', dict(chunk_size=8, scale_first=False, in_bias=True)),
  ('mamba', dict(chunk_size=8, discretization='zoh')),
  ('mamba', dict(chunk_size=8, select_norm='plain', conv_bias=False)),
  ('mamba', dict(chunk_size=8, select_norm='scaled', in_bias=True)),
  ('mamba2', dict(chunk_size=8, groups=2, dt_min=0.02, dt_max=0.05)),
  (
    'mamba2',
    dict(
      chunk_size=8,
      head_dim=6,
      groups=2,
      norm='before_gate',
      multipliers=(0.5, 2.0, 1.5, 0.7, 0.9),
    ),
  ),
  ('mamba2', dict(chunk_size=8, norm='none', in_bias=True, out_bias=True)),
  ('log_linear', dict(chunk_size=8, groups=2)),
  ('kda', dict(chunk_size=64, expand_v=2.0, decay_bound=-5.0)),
]
every_case = pytest.mark.parametrize(
  'name,options',
  [
    pytest.param(
      name,
      options,
      id=f'{name}-{"-".join(map(str, options))}',
      # One worker runs all tests of a row: they share compiled programs.
      marks=[pytest.mark.xdist_group(name), *marks],
    )
    for cases, marks in (
      (CASES + OPTIONS, ()),
      (MORE, (pytest.mark.exhaustive,)),
    )
    for name, options in cases
  ],
)


def make(name, options, causal=None):
  if causal is None:
    causal = name not in MIXERS or MIXERS[name].causal
  return _make(name, tuple(options.items()), causal)


def decoder(name, options):
  """The mixer of a decoder, or None where the row says there is none."""
  if MIXERS[name].causal:
    return make(name, options)
  with pytest.raises(ConfigError, match='mixer of encoders'):
    make(name, options, causal=True)
  mixer = make(name, options)
  with pytest.raises(NotImplementedError, match='no cache'):
    mixer.init_cache(B, T, jnp.float32)
  return None


@functools.cache
def _make(name, options, causal):
  # Not one program: op by op the small shapes are compiled once for all rows.
  mixer = build_mixer(
    name,
    d_model=D,
    num_heads=N,
    causal=causal,
    rngs=nnx.Rngs(0),
    **dict(options),
  )
  # Biases and gates that start at zero would hide mistakes.
  graphdef, params = nnx.split(mixer)
  rng = np.random.default_rng(0)
  noisy = jax.tree.map(
    lambda x: x + 0.1 * rng.standard_normal(x.shape, x.dtype), params
  )
  return nnx.merge(graphdef, noisy)


def inputs(seed=7):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((B, T, D), np.float32))


def grid_of(mixer, x):
  """Rows of four, if the tokens make them, where a mixer needs a grid."""
  if not isinstance(mixer, OnGrid):
    return ()
  length = x.shape[1]
  return (length // 4, 4) if length % 4 == 0 else (length, 1)


def run(mixer, x, segment_ids=None):
  positions = None
  if segment_ids is not None:
    start = jnp.concatenate(
      [jnp.ones_like(segment_ids[:, :1]), jnp.diff(segment_ids)], 1
    )
    index = jnp.arange(x.shape[1])
    first = jax.lax.cummax(jnp.where(start != 0, index, 0), axis=1)
    positions = index - first
  context = Context(
    positions=positions, segment_ids=segment_ids, grid=grid_of(mixer, x)
  )
  return mixer(x, context)[0]


# On a CPU a call without gradients takes the recurrent form of an op, one with
# gradients the chunkwise form: `evaluated` and `called` differ in that.
evaluated = jax.jit(run)


@jax.jit
def called(mixer, x, cache=None):
  """The call of a training step without its gradients."""
  context = Context(grid=grid_of(mixer, x))
  y, _, cache = jax.vjp(lambda x: mixer(x, context, cache), x, has_aux=True)
  return y if cache is None else (y, cache)


@jax.jit
def decoded(mixer, x, cache):
  return mixer(x, cache=cache)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def gradients(mixer, x, weight, segment_ids=None):
  """Of the weighted sum of the outputs, to the parameters and the inputs."""
  y = run(mixer, x, segment_ids)
  return jnp.sum(y * weight), y


def step(name, mixer, x, weight, segment_ids=None):
  """Value, outputs and gradients; all tests of a row share one program.

  Segments of a whole row are none; `test_sharded_equals_unsharded` compares
  with a program without any.
  """
  if MIXERS[name].packing and segment_ids is None:
    segment_ids = np.ones((B, T), np.int32)
  (value, y), grads = gradients(mixer, x, weight, segment_ids)
  return value, y, grads


def trained(name, mixer, x):
  return step(name, mixer, x, inputs(seed=9))[1]


def close(found, expected, tolerance):
  """All leaves are, in relation to the largest number of each."""
  found = jax.tree_util.tree_leaves_with_path(found)
  for (path, a), b in zip(found, jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(
      a,
      b,
      rtol=1e-7,
      atol=tolerance * (1 + np.abs(b).max()),
      err_msg=jax.tree_util.keystr(path),
    )


@every_case
def test_evaluation_equals_training(name, options):
  mixer = make(name, options)
  x = inputs()
  y = trained(name, mixer, x)
  assert y.shape == x.shape and y.dtype == x.dtype
  chex.assert_tree_all_finite(y)
  assert np.std(y) > 1e-3
  np.testing.assert_allclose(evaluated(mixer, x), y, rtol=2e-6, atol=2e-5)


@every_case
def test_bfloat16_in_bfloat16_out(name, options):
  mixer = make(name, options)
  x = inputs()
  y = called(mixer, x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16
  expected = trained(name, mixer, x)
  error = np.abs(y.astype(np.float32) - expected)
  # A rounded input may change what a token chooses to read: few tokens do.
  routed = MIXERS[name].forms == ('routed',)
  error = error.mean() if routed else error.max()
  assert error < 0.05 * np.abs(expected).max()


@every_case
def test_causal_to_the_bit(name, options):
  mixer = decoder(name, options)
  if mixer is None:
    return
  x = inputs()
  y = trained(name, mixer, x)
  for cut in (1, 8, 13, T - 1):
    changed = trained(name, mixer, x.at[:, cut:].add(3.0))
    np.testing.assert_array_equal(
      changed[:, :cut], y[:, :cut], f'before the change at {cut}'
    )
    if options.get('window') != 1:
      assert (changed[:, cut:] != y[:, cut:]).any(), f'nothing sees {cut}'
  changed = trained(name, mixer, x.at[:, 13:].multiply(1e18))
  np.testing.assert_array_equal(changed[:, :13], y[:, :13])


@every_case
def test_packed_equals_separate(name, options):
  mixer = make(name, options)
  x, weight = inputs(), inputs(seed=9)
  lengths = (5, 1, 12, 6)
  # Segments in the first row; the others hold numbers that must not matter.
  # An id that comes again is another segment.
  ids = np.tile(np.repeat([3, 9, 3, 9], lengths), (B, 1)).astype(np.int32)
  if not MIXERS[name].packing:
    with pytest.raises(NotImplementedError, match='packed sequences'):
      run(mixer, x, jnp.asarray(ids))
    return
  first = weight * (jnp.arange(B) == 0)[:, None, None]
  # Each segment as a row of its own, with tokens behind it that do not count.
  cuts = np.cumsum((0, *lengths))
  index = np.minimum(cuts[:-1, None] + np.arange(T), T - 1)
  counts = np.arange(T) < np.array(lengths)[:, None]
  # Gradients of the parameters and the inputs cover outputs and states.
  value, _, (grads, x_grad) = step(name, mixer, x, first, ids)
  rows = x[0, index], jnp.where(counts[..., None], weight[0, index], 0)
  expected, _, (expected_grads, rows_grad) = step(name, mixer, *rows)
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  close([x_grad[0], grads], [rows_grad[counts], expected_grads], 2e-4)
  np.testing.assert_array_equal(x_grad[1:], 0)


def clean(name, mixer, x, counts, ids):
  """Outputs and gradients, of x too, of the tokens that count."""
  weight = inputs(seed=9)
  weight = jnp.where(counts[:, None], weight, 0)
  _, y, (grads, x_grad) = step(name, mixer, x, weight, ids)
  return y[:, counts], x_grad[:, counts], grads


@every_case
def test_nothing_reaches_a_token_from_padding_or_another_segment(name, options):
  if not MIXERS[name].packing:
    return  # refused: `test_packed_equals_separate`
  mixer = make(name, options)
  x = inputs()
  # Padding at the front, within and behind.
  ids = np.repeat([0, 5, 0, 2, 7, 0], (2, 7, 3, 6, 4, 2)).astype(np.int32)
  rows = np.tile(ids, (B, 1))
  expected = clean(name, mixer, x, ids > 0, rows)
  for anything in (jnp.nan, -jnp.inf, 3e38):
    changed = jnp.where((ids == 0)[:, None], anything, x)
    # In part of the channels only.
    changed = changed.at[:, -1, : D // 2].set(x[:, -1, : D // 2])
    found = clean(name, mixer, changed, ids > 0, rows)
    close(found, expected, 1e-6)
  # Of 1e18 a mixer may make more than float32 holds, whose gradient is NaN.
  expected = clean(name, mixer, x, ids == 2, rows)
  for factor, parts in ((1e18, 1), (1e6, 2)):
    changed = jnp.where((ids == 2)[:, None], x, factor * x)
    found = clean(name, mixer, changed, ids == 2, rows)
    close(found[:parts], expected[:parts], 1e-5)


@every_case
def test_cache_continues_the_sequence(name, options):
  mixer = decoder(name, options)
  if mixer is None:
    return
  x = inputs()
  # Only two programs: pieces longer than a chunk, and token by token.
  for lengths in ((11, 1, 11, 1), (1,) * T):
    cache = mixer.init_cache(B, T, x.dtype)
    parts = []
    for a, b in itertools.pairwise(np.cumsum((0, *lengths))):
      call = called if b - a > 1 else decoded
      y, cache = call(mixer, x[:, a:b], cache)
      parts.append(y)
    np.testing.assert_allclose(
      jnp.concatenate(parts, axis=1), evaluated(mixer, x), rtol=2e-6, atol=2e-5
    )


@every_case
def test_cache_size_grows_as_the_row_says(name, options):
  mixer = decoder(name, options)
  if mixer is None:
    return
  sizes = [
    sum(
      leaf.size for leaf in jax.tree.leaves(mixer.init_cache(1, m, 'float32'))
    )
    for m in (1000, 2000, 4000)
  ]
  if MIXERS[name].state == 'log':
    assert 0 < sizes[1] - sizes[0] == sizes[2] - sizes[1]
    return
  if MIXERS[name].state:  # without what has a fixed size beside it
    sizes = np.diff(sizes)
  grows = 2 ** MIXERS[name].state
  assert sizes[-1] / max(sizes[-2], 1) == pytest.approx(grows, rel=3e-3) or (
    set(sizes) == {1}  # a window of one token keeps nothing but its length
  )


@every_case
def test_bidirectional_or_refused(name, options):
  if options.get('conv_width'):
    with pytest.raises(ConfigError, match='causal'):
      make(name, options, causal=False)
    return
  if not MIXERS[name].bidirectional:
    with pytest.raises(ConfigError, match='causal only'):
      make(name, options, causal=False)
    return
  mixer = make(name, options, causal=False)
  x = inputs()
  y = called(mixer, x)
  changed = called(mixer, x.at[:, T - 1].add(3.0))
  reach = options.get('window', REACH.get(name, T))
  near = slice(T - 1 - reach // 2 if reach < T else 0, T)
  differs = (changed[:, near] != y[:, near]).any(axis=-1)
  # Weights of exactly zero do not reach all others.
  some = FAMILIES['sparse'] | FAMILIES['routed'] | {'entmax': None}
  if reach == T and name in some:
    assert differs[:, :-1].any()
  else:
    assert differs.all()


@every_case
def test_sharded_equals_unsharded(name, options):
  mixer = make(name, options)
  graphdef, params = nnx.split(mixer)
  x, weight = inputs(), inputs(seed=11)
  expected, _, expected_grads = step(name, mixer, x, weight)
  mesh = sharding.make_mesh('data=2,fsdp=2,tensor=2', jax.devices()[:8])
  placed = jax.tree.map(
    lambda p: p.replace(
      jax.device_put(
        p[...], jax.NamedSharding(mesh, sharding.param_spec(p.axes))
      )
    ),
    params,
    is_leaf=lambda p: isinstance(p, nnx.Variable),
  )
  with jax.set_mesh(mesh):
    rows = sharding.activation_spec(('batch', None, None))
    x, weight = jax.device_put((x, weight), jax.NamedSharding(mesh, rows))
    placed = nnx.merge(graphdef, placed)
    (value, _), grads = gradients(placed, x, weight)
  np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
  # Both gradients of rebased are off by up to 1.3e-5 of float64 on jax 0.12.
  close(grads, expected_grads, 4e-5 if name == 'rebased' else 2e-5)


def test_unknown_names_and_options():
  with pytest.raises(ConfigError, match="did you mean 'retention'"):
    make('retentoin', {})
  with pytest.raises(ConfigError, match="did you mean 'num_kv_heads'"):
    make('attention', dict(num_kv_head=2))
  with pytest.raises(ConfigError, match="did you mean 'num_kv_heads'"):
    make('window', dict(num_kv_head=2))
  with pytest.raises(ConfigError, match='does not divide'):
    make('attention', dict(num_kv_heads=3))


@pytest.mark.parametrize('name', MIXERS)
def test_any_number_of_heads_works_or_is_refused(name):
  x, options = jax.ShapeDtypeStruct((B, T, D), jnp.float32), dict(CASES)[name]

  def call(x):
    mixer = build_mixer(
      name,
      d_model=D,
      num_heads=3,
      causal=MIXERS[name].causal,
      rngs=nnx.Rngs(0),
      **options,
    )
    return mixer(x, Context(grid=grid_of(mixer, x)))[0]

  with contextlib.suppress(ConfigError):
    assert jax.eval_shape(call, x).shape == x.shape


def test_heads_of_one_mixer_of_a_model():
  config = LMConfig(
    d_model=D,
    num_heads=4,
    num_layers=2,
    pattern=('attention', 'gla'),
    mixers={'gla': {'num_heads': '2'}},
  )
  stack = nnx.eval_shape(lambda: Stack(config, True, rngs=nnx.Rngs(0)))
  heads = [b.mixer.qkv.query.weight.shape[-2] for b in stack.blocks()]
  assert heads == [4, 2]


@pytest.mark.parametrize('name', MIXERS)
def test_options_have_defaults(name):
  for option, parameter in mixer_options(name).items():
    assert parameter.default is not parameter.empty, option


@pytest.mark.parametrize('name', MIXERS)
def test_rows_are_complete(name):
  for field in dataclasses.fields(MIXERS[name]):
    assert getattr(MIXERS[name], field.name) not in ('', None, ())
