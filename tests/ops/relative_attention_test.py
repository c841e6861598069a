"""Relative positions with a memory, and with a compressed one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.softmax.compressive import (
  complete_blocks,
  compressive_attention,
  init_memory,
)
from efficient_attn.ops.softmax.relative_attention import (
  relative_attention,
  relative_rows,
  relative_shift,
  transformer_xl,
)
from tests.ops.low_rank_cases import check, normal, place, unchecked
from tests.optimized import optimized
from tests.oracles import low_rank as oracle

B, N, H, V, D = 2, 2, 3, 4, 6
MEMORY, SLOTS, RATE = 4, 3, 2
SIZES = dict(memory=MEMORY, num_slots=SLOTS, rate=RATE)
PARAMS = dict(weight=(D, N, H), content_bias=(N, H), position_bias=(N, H))


def arrays(T, seed=0, entries=None):
  shapes = dict(query=(B, T, N, H), key=(B, T, N, H), value=(B, T, N, V))
  if entries is not None:
    shapes |= dict(slot_key=(B, entries, N, H), slot_value=(B, entries, N, V))
  return normal(seed, **shapes, **PARAMS)


def ids_of(T, seed=3):
  rng = np.random.default_rng(seed)
  return (np.cumsum(rng.random((B, T)) < 0.4, axis=1) % 2).astype(np.int32)


@pytest.mark.parametrize(
  'T, segments, bidirectional',
  [
    (1, False, False),
    (MEMORY, False, False),
    (MEMORY + 1, False, False),
    (13, False, False),
    (13, True, False),
    (5, False, True),
    (7, True, True),
  ],
)
def test_transformer_xl(T, segments, bidirectional):
  options = dict(memory=MEMORY, bidirectional=bidirectional)
  ids = ids_of(T) if segments else np.zeros((B, T), np.int32)

  def op(**arrays):
    ids_or_none = jnp.asarray(ids) if segments else None
    return transformer_xl(**arrays, **options, segment_ids=ids_or_none)[0]

  check(
    op,
    functools.partial(oracle.transformer_xl, **options, segment_ids=ids),
    arrays(T),
  )


@pytest.mark.parametrize('T', [1, MEMORY, MEMORY + 1, 2 * MEMORY, 21])
def test_compressive(T):
  check(
    lambda **a: compressive_attention(**a, **SIZES)[0],
    functools.partial(oracle.compressive, **SIZES),
    arrays(T, entries=T // RATE),
  )


def test_rows_of_the_reference():
  T, S = 3, 7
  data = normal(2, query=(B, T, N, H), key=(B, S, N, H), value=(B, S, N, V))
  biases = normal(3, content_bias=(N, H), position_bias=(N, H))
  relative = normal(4, relative=(S + T - 1, N, H))
  rows = S - 1 - (S - T + np.arange(T)[:, None] - np.arange(S))
  with jax.enable_x64(True):
    arrays = data | biases | relative
    out = jax.jit(relative_attention)(**arrays)
    same = jax.jit(relative_attention)(**arrays, rows=rows)
  np.testing.assert_allclose(out, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize('T, S', [(1, 1), (1, 4), (3, 3), (3, 5)])
def test_relative_shift(T, S):
  x = normal(0, x=(2, T, S + T - 1))['x']
  y = relative_shift(jnp.asarray(x), S)
  for t, s in np.ndindex(T, S):
    np.testing.assert_array_equal(
      y[:, t, s], x[:, t, s + T - 1 - t].astype('f')
    )


TOKENS = ('query', 'key', 'value')


def between(data, a, b):
  return data | {name: data[name][:, a:b] for name in TOKENS}


@functools.cache
def xl_step():
  return jax.jit(functools.partial(transformer_xl, memory=MEMORY))


@pytest.mark.parametrize('segments', [False, True])
def test_the_memory_continues_at_every_cut(segments):
  T = 11
  data, ids = arrays(T), ids_of(T) if segments else np.zeros((B, T), np.int32)
  expected = oracle.transformer_xl(**data, memory=MEMORY, segment_ids=ids)
  with jax.enable_x64(True):
    _, whole = xl_step()(**data, segment_ids=ids)
    # Tokens one at a time, so that there are few programs; then longer pieces.
    for cuts in (range(T + 1), (0, 1, 6, 11)):
      parts, state = [], None
      for a, b in itertools.pairwise(cuts):
        # An id continues across the cut, a new one starts behind it.
        new = ids[:, a:b]
        if state is not None:
          same = ids[:, a] == ids[:, a - 1]
          length = jnp.where(same, state.length, 0)
          state = state._replace(length=length)
        part, state = xl_step()(
          **between(data, a, b), segment_ids=new, initial_state=state
        )
        parts.append(part)
      np.testing.assert_allclose(
        np.concatenate(parts, axis=1), expected, rtol=0, atol=1e-11
      )
      np.testing.assert_array_equal(state.length, whole.length)
      np.testing.assert_array_equal(state.key, data['key'][:, -MEMORY:])
      np.testing.assert_array_equal(state.value, data['value'][:, -MEMORY:])
  lengths = [
    len(row) - np.flatnonzero(np.diff(row, prepend=-1))[-1] for row in ids
  ]
  np.testing.assert_array_equal(whole.length, lengths)


@functools.cache
def compressive_step():
  """One call of the mixer's two ops, with entries that are plain means."""

  def step(data, state, tail):
    rows = {}
    for name in ('key', 'value'):
      x = data[name]
      flat, tail[name] = complete_blocks(
        x.reshape(B, x.shape[1], -1), RATE, tail[name], state.length
      )
      rows[f'slot_{name}'] = flat.mean(2).reshape(B, -1, *x.shape[2:])
    out, state = compressive_attention(
      **data, **rows, **SIZES, initial_state=state
    )
    return out, state, tail

  return jax.jit(step)


@pytest.mark.parametrize(
  'cuts', [tuple(range(24)), (0, 5, 6, 17, 22, 23), (0, 23)], ids=len
)
def test_the_compressed_memory_continues(cuts):
  T = 23
  data = arrays(T)
  entries = {
    f'slot_{name}': oracle.compress(
      data[name].reshape(B, T, -1), RATE, 'mean'
    ).reshape(B, T // RATE, N, -1)
    for name in ('key', 'value')
  }
  expected = oracle.compressive(**data, **entries, **SIZES)
  with jax.enable_x64(True):
    state = init_memory(B, (N, H), np.float64, **SIZES)
    values = init_memory(B, (N, V), np.float64, **SIZES)
    state = state._replace(value=values.value, slot_value=values.slot_value)
    tail = dict(key=np.zeros((B, 1, N * H)), value=np.zeros((B, 1, N * V)))
    parts = []
    for a, b in itertools.pairwise(cuts):
      out, state, tail = compressive_step()(between(data, a, b), state, tail)
      parts.append(out)
  np.testing.assert_allclose(
    np.concatenate(parts, axis=1), expected, rtol=0, atol=1e-11
  )
  assert state.length == T


def test_without_entries_the_memory_is_the_segment_before():
  segment = np.arange(13) // MEMORY
  seen = (segment[:, None] - segment <= 1) & np.tri(13, dtype=bool)

  def both(data):
    sizes = SIZES | dict(num_slots=0)
    masked = relative_attention(
      *(data[name] for name in TOKENS),
      relative_rows(12, 0, data['weight']),
      data['content_bias'],
      data['position_bias'],
      mask=jnp.asarray(seen)[None],
    )
    return compressive_attention(**data, **sizes)[0], masked

  np.testing.assert_allclose(*jax.jit(both)(arrays(13, entries=6)), atol=1e-5)


@pytest.mark.parametrize('name', ['transformer_xl', 'compressive'])
def test_causal_to_the_bit(name):
  T = 21
  data = {k: x.astype(np.float32) for k, x in arrays(T).items()}
  if name == 'compressive':
    # Entries of blocks that are not in the past yet change with their tokens.
    data |= {
      k: x.astype(np.float32)
      for k, x in normal(
        1, slot_key=(B, T // 2, N, H), slot_value=(B, T // 2, N, V)
      ).items()
    }

  @optimized  # optimised, as in training
  def run(data):
    if name == 'compressive':
      return compressive_attention(**data, **SIZES)[0]
    return transformer_xl(**data, memory=MEMORY)[0]

  out = run(data)
  for cut in (1, MEMORY, 10, T - 1):
    later = {
      key: np.where(
        np.arange(T)[:, None, None] >= cut, 3 + data[key], data[key]
      )
      for key in TOKENS
    }
    if name == 'compressive':
      index = np.arange(T // RATE)[:, None, None]
      later |= {
        key: np.where((index + 1) * RATE > cut, 3 + data[key], data[key])
        for key in ('slot_key', 'slot_value')
      }
    changed = run(data | later)
    np.testing.assert_array_equal(
      changed[:, :cut], out[:, :cut], f'cut at {cut}'
    )
    assert (changed[:, cut:] != out[:, cut:]).any(), cut


def test_no_gradient_into_the_memory():
  data = place(arrays(5))

  @jax.jit
  @functools.partial(jax.value_and_grad, allow_int=True)
  def loss(state):
    out, _ = transformer_xl(**data, memory=MEMORY, initial_state=state)
    return out.sum()

  _, state = xl_step()(**data)
  value, gradient = loss(state)
  np.testing.assert_array_equal(gradient.key, 0)
  np.testing.assert_array_equal(gradient.value, 0)
  assert loss(state._replace(key=state.key + 1))[0] != value


@unchecked()
def test_wrong_calls():
  data = place(arrays(5))
  with pytest.raises(ValueError, match='memory = 0'):
    transformer_xl(**data, memory=0)
  with pytest.raises(ValueError, match=r'content_bias .*\(2, 1\): pass \(2, 3'):
    wrong = data['content_bias'][:, :1]
    transformer_xl(**data | dict(content_bias=wrong), memory=2)
  data = place(arrays(5, entries=1))
  with pytest.raises(ValueError, match='multiple of rate = 3'):
    compressive_attention(**data, memory=4, num_slots=2, rate=3)
  with pytest.raises(ValueError, match=r'slot_value .*\(2, 0, 2, 4\): pass'):
    wrong = data['slot_value'][:, :0]
    compressive_attention(**data | dict(slot_value=wrong), **SIZES)
