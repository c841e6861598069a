"""Every form, gate and option of linear_attention against the recurrence."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.recurrent.affine_summary import affine_summary
from efficient_attn.ops.recurrent.forms import choose_form
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ConfigError
from tests.ops.linear_attention_cases import (
  BATCH,
  CHANNELS,
  CHUNK,
  FEATURES,
  GATES,
  HEADS,
  LENGTH,
  VALUES,
  apply,
  assert_close,
  cotangents_of,
  make,
  reference,
  to_jax,
  vjp,
)
from tests.optimized import optimized
from tests.oracles import linear_attention as oracle
from tests.rotation import combinations

# What is left out is part of what is in.
CASES = [
  *combinations(GATES, FEATURES, ['chunkwise']),
  *combinations(
    GATES, ['exclusive_bonus', 'normalize', 'bidirectional'], ['parallel']
  ),
]


@pytest.mark.parametrize('gate, feature, form', CASES)
def test_forms_agree_in_outputs_states_and_gradients(gate, feature, form):
  arrays, options, cotangents, expected = reference(gate, feature, LENGTH)
  with jax.enable_x64(True):
    actual = vjp(
      to_jax(arrays),
      to_jax(cotangents),
      form=form,
      chunk_size=CHUNK,
      **options,
    )
    assert_close(actual, expected, 1e-11)


LENGTHS = [('channel', n) for n in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 13)]


@pytest.mark.parametrize(
  'gate, length', [*LENGTHS, ('scalar', 1), ('scalar', CHUNK + 1)]
)
def test_lengths(gate, length):
  arrays, options, cotangents, expected = reference(
    gate, 'state_segments', length
  )
  with jax.enable_x64(True):
    actual = vjp(
      to_jax(arrays),
      to_jax(cotangents),
      form='chunkwise',
      chunk_size=CHUNK,
      **options,
    )
    assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize('gate', ['constant', 'channel'])
def test_chunk_size_does_not_matter(gate):
  arrays, options = make(gate, 21, state=True, segments=True)
  expected = oracle.linear_attention(**arrays, **options)
  with jax.enable_x64(True):
    for chunk_size in (1, 2, 4, 16, 64):
      actual = apply(to_jax(arrays), **options, chunk_size=chunk_size)
      assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize(
  'gate, form_and_read',
  combinations(
    GATES,
    itertools.product(['chunkwise', 'parallel'], ['inclusive', 'exclusive']),
  ),
)
def test_causality_is_bitwise(gate, form_and_read):
  form, read = form_and_read
  arrays, options = make(gate, 37, segments=True, dtype=np.float32)
  other, other_options = make(gate, 37, segments=True, seed=3, dtype=np.float32)
  if gate == 'constant':
    other['log_decay'] = arrays['log_decay']
  if gate in ('scalar', 'channel'):
    other['log_decay'] *= 1000
  call = optimized(
    lambda arrays, ids: linear_attention(
      **arrays, segment_ids=ids, read=read, form=form, chunk_size=16
    )[0]
  )
  out = np.asarray(call(to_jax(arrays), options['segment_ids']))
  for cut in (1, 2, 7, 15, 16, 17, 31, 36):

    def splice(x, y, cut=cut):
      if x.ndim == 1:
        return x
      return np.concatenate([x[:, :cut], y[:, cut:]], 1)

    changed = call(
      to_jax(jax.tree.map(splice, arrays, other)),
      splice(options['segment_ids'], other_options['segment_ids']),
    )
    np.testing.assert_array_equal(
      changed[:, :cut], out[:, :cut], f'cut at {cut}'
    )
    assert np.any(changed[:, cut:] != out[:, cut:]), cut


@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_packed_equals_separate(gate):
  lengths = (6, 1, 1, 6, 6)
  ids = np.repeat(np.array([4, 1, 2, 1, 7]), lengths)[None].astype(np.int32)
  arrays, options = make(gate, sum(lengths), options={}, batch=1)
  run = functools.partial(vjp, form='chunkwise', chunk_size=CHUNK)
  with jax.enable_x64(True):
    cotangents = to_jax(cotangents_of(arrays, options))
    arrays = to_jax(arrays)
    out, state, grads = run(arrays, cotangents, ids)
    start = 0
    for i, length in enumerate(lengths):
      span = slice(start, start + length)
      cut = lambda x, span=span: x[:, span]  # noqa: E731
      last = i == len(lengths) - 1
      cotangent = cotangents[1] if last else jnp.zeros_like(state)
      separate = run(jax.tree.map(cut, arrays), (cut(cotangents[0]), cotangent))
      assert_close(cut(out), separate[0], 1e-12)
      assert_close(jax.tree.map(cut, grads), separate[2], 1e-12)
      start += length
    assert_close(state, separate[1], 1e-12)


def test_state_continues_at_every_cut():
  arrays, options = make(
    'channel', 7, segments=True, options={'normalize': True}
  )
  ids = options['segment_ids']
  expected = oracle.linear_attention(**arrays, **options)
  call = functools.partial(apply, normalize=True, chunk_size=2)
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    for cut in range(1, 7):
      first, state = call(
        {name: x[:, :cut] for name, x in arrays.items()}, ids[:, :cut]
      )
      # A boundary exactly at the cut is for whoever cuts to apply.
      fresh = jnp.asarray(ids[:, cut] != ids[:, cut - 1])
      state = jax.tree.map(
        lambda x, fresh=fresh: jnp.where(
          fresh.reshape(-1, *[1] * (x.ndim - 1)), 0, x
        ),
        state,
      )
      rest = {name: x[:, cut:] for name, x in arrays.items()}
      second, state = call({**rest, 'initial_state': state}, ids[:, cut:])
      out = jnp.concatenate([first, second], 1)
      assert_close((out, state), expected, 1e-12)


def test_decoding_token_by_token():
  arrays, _ = make('channel', 7, options={'normalize': True})
  options = {'normalize': True, 'form': 'recurrent'}
  expected = oracle.linear_attention(**arrays, normalize=True)
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    memory = jnp.zeros((BATCH, HEADS, CHANNELS, VALUES))
    state, outs = (memory, memory[..., 0]), []
    for t in range(7):
      token = {name: x[:, t : t + 1] for name, x in arrays.items()}
      out, state = apply({**token, 'initial_state': state}, **options)
      outs.append(out)
    assert_close((jnp.concatenate(outs, 1), state), expected, 1e-12)


@pytest.mark.parametrize('segments', [False, True])
@pytest.mark.parametrize('gate', GATES)
def test_affine_summary(gate, segments):
  arrays, options = make(gate, 13, state=True, segments=segments)
  _, expected = oracle.linear_attention(**arrays, **options)
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    initial = arrays.pop('initial_state')
    arrays.pop('q')
    summary = jax.jit(affine_summary, static_argnames='chunk_size')
    m, u = summary(**arrays, **options, chunk_size=4)
    assert_close(m[..., None] * initial + u, expected, 1e-12)


@pytest.mark.in_turn
@pytest.mark.parametrize('gate', ['scalar', 'channel'])
def test_jvp_pairs_with_vjp_and_second_order_works(gate):
  arrays, _ = make(gate, 5, batch=1)
  rng = np.random.default_rng(4)
  cotangents = cotangents_of(arrays, {})
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    tangents = jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape)), arrays
    )

    def call(arrays):
      return linear_attention(**arrays, chunk_size=2)

    def slope(arrays):
      moved = jax.jvp(call, (arrays,), (tangents,))[1]
      return sum(jnp.vdot(x, y) for x, y in zip(moved, cotangents, strict=True))

    _, _, grads = vjp(
      arrays, to_jax(cotangents), form='chunkwise', chunk_size=2
    )
    paired = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, tangents)))
    np.testing.assert_allclose(jax.jit(slope)(arrays), paired, rtol=1e-12)
    second = jax.jit(jax.grad(slope))(arrays)
    step = 1e-5
    shifted = [
      jax.jit(slope)(
        jax.tree.map(lambda x, d, s=s: x + s * d, arrays, tangents)
      )
      for s in (step, -step)
    ]
    curvature = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, second, tangents)))
    difference = (shifted[0] - shifted[1]) / (2 * step)
    np.testing.assert_allclose(curvature, difference, rtol=1e-6)


def test_vmap_equals_a_loop():
  arrays, options = make('channel', 13, state=True, segments=True, batch=4)
  ids = options['segment_ids']
  split = lambda x: jnp.asarray(x).reshape(2, 2, *x.shape[1:])  # noqa: E731

  @jax.jit
  @jax.vmap
  def call(arrays, ids):
    return linear_attention(
      **arrays, segment_ids=ids, form='chunkwise', chunk_size=4
    )

  with jax.enable_x64(True):
    batched = jax.tree.map(split, arrays)
    out, state = call(batched, split(ids))
    expected = oracle.linear_attention(**arrays, **options)
    merged = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), (out, state))
    assert_close(merged, expected, 1e-12)


def test_gates_that_mean_the_same_agree():
  arrays, _ = make('constant', LENGTH)
  constant = arrays['log_decay']
  scalar = np.broadcast_to(constant, (BATCH, LENGTH, HEADS))
  channel = np.broadcast_to(scalar[..., None], (*scalar.shape, CHANNELS))
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    results = [
      apply({**arrays, 'log_decay': jnp.asarray(gate)}, chunk_size=CHUNK)
      for gate in (constant, scalar, channel)
    ]
    assert_close(results[1], results[0], 1e-13)
    assert_close(results[2], results[0], 1e-13)
    arrays['log_decay'] = jnp.zeros(HEADS)
    gated = apply(arrays, chunk_size=CHUNK)
    del arrays['log_decay']
    assert_close(gated, apply(arrays, chunk_size=CHUNK), 1e-13)


def test_sharded_over_batch_and_heads_equals_whole():
  arrays, _ = make('channel', 13, kv_heads=4, dtype=np.float32)
  arrays = to_jax(arrays)
  mesh = jax.make_mesh(
    (2, 4),
    ('batch', 'heads'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  spec = jax.P('batch', None, 'heads')
  sharded = jax.shard_map(
    lambda a: linear_attention(**a, form='chunkwise', chunk_size=4),
    mesh=mesh,
    in_specs=(spec,),
    out_specs=(spec, jax.P('batch', 'heads')),
    check_vma=False,
  )
  expected = apply(arrays, chunk_size=4)
  assert_close(optimized(sharded)(arrays), expected, 1e-6)


ERRORS = {
  'q has shape': lambda a: {**a, 'q': a['q'][:, :-1]},
  'batch and length': lambda a: {**a, 'v': a['v'][:, :-1]},
  'not a multiple': lambda a: {**a, 'v': a['v'][:, :, :3]},
  'no kind of gate': lambda a: {**a, 'log_decay': jnp.zeros((2, 13, 2))},
  'floating': lambda a: {**a, 'v': jnp.zeros((2, 13, 4, 5), int)},
  'segment_ids has shape': lambda a: {
    **a,
    'segment_ids': jnp.zeros((2, 12), int),
  },
  'power of two': lambda a: {**a, 'chunk_size': 48},
  "form = 'chunk'": lambda a: {**a, 'form': 'chunk'},
  "read = 'before'": lambda a: {**a, 'read': 'before'},
  "read='exclusive'": lambda a: {**a, 'bonus': jnp.zeros((4, 3))},
  'no meaning with bidirectional': lambda a: {
    **a,
    'bidirectional': True,
    'initial_state': jnp.zeros((2, 4, 3, 5)),
  },
  'must be the pair': lambda a: {
    **a,
    'normalize': True,
    'initial_state': jnp.zeros((2, 4, 3, 5)),
  },
  'initial_state has shape': lambda a: {
    **a,
    'initial_state': jnp.zeros((2, 4, 5, 3)),
  },
  'is empty': lambda a: {name: x[:, :0] for name, x in a.items()},
}


@pytest.mark.parametrize('message', ERRORS)
def test_wrong_calls_say_what_is_wrong(message):
  arrays = to_jax(make('none', 13, dtype=np.float32)[0])
  # Without the annotation check, as users call it.
  call = inspect.unwrap(linear_attention)
  with pytest.raises(ValueError, match=message):
    call(**ERRORS[message](arrays))


def test_unknown_implementation():
  arrays = to_jax(make('none', 13, dtype=np.float32)[0])
  with pytest.raises(ConfigError, match="'cudnn' of linear_attention does not"):
    linear_attention(**arrays, implementation='cudnn')


def test_without_a_form_the_platform_and_the_gradients_choose():
  arrays, options = make('channel', 37, segments=True, dtype=np.float32)
  arrays = to_jax({**arrays, **options})

  @functools.partial(jax.jit, static_argnums=0)
  def run(form, arrays):
    return linear_attention(**arrays, form=form, chunk_size=8)[0]

  def gradients(form):
    ids = {'segment_ids': arrays['segment_ids']}
    floats = {k: x for k, x in arrays.items() if k not in ids}
    return jax.grad(lambda a: jnp.sum(run(form, a | ids) ** 2))(floats)

  platform = jax.default_backend()
  for length in (1, 37):
    first = {k: x[:, :length] if x.ndim > 1 else x for k, x in arrays.items()}
    form, _ = choose_form(platform, length, gradients=False)
    np.testing.assert_array_equal(run(None, first), run(form, first))
  form, _ = choose_form(platform, 37, gradients=True)
  assert form == 'chunkwise'
  for x, y in zip(
    jax.tree.leaves(gradients(None)),
    jax.tree.leaves(gradients(form)),
    strict=True,
  ):
    np.testing.assert_array_equal(x, y)
