import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from tests.ops.attention_cases import MASKS, expressions, make_data
from tests.oracles import attention as oracle

SIZES = [(1, 8), (5, 5), (13, 7)]
BLOCKS = [(1, 1), (4, 3), (3, 4), (16, 16)]
B, N = 2, 2


NAMES = [name for name in MASKS if name != 'none']
# Static and not composed: their block maps are exact.
EXACT = [
  'unbounded',
  'causal',
  'causal_ahead',
  'causal_behind',
  'window',
  'window_left',
  'window_right',
  'window_shifted',
  'window_inverted',
  'not_causal',
  'not_window',
  'dilated',
  'strided',
  'logsparse',
  'fixed',
  'block_window',
  'prefix',
  'leading',
  'global',
  'cascade',
  'neighborhood_1d',
  'neighborhood_2d',
  'neighborhood_3d',
  'neighborhood_tiles',
  'radial',
  'radial_far',
  'radial_wide',
  'blocks',
  'blocks_heads',
  'random_blocks',
  'heads_all',
]


# Op by op this file would take several times as long.


def test_every_rule_has_an_expression():
  assert set(oracle.rules(make_data(B, N, 1, 1))) == set(MASKS)


@functools.cache
def expected(T, S):
  """What each mask admits, [B, N, T, S]."""
  rules = oracle.rules(make_data(B, N, T, S))
  return {name: oracle.admitted(rules[name], (B, N, T, S)) for name in NAMES}


def part(T, S):
  return slice(T // 2, T), slice(S // 3, S // 3 + (S + 1) // 2)


@functools.cache
def evaluated(T, S, traced):
  """Dense and one tile of each mask, which is an argument if `traced`."""
  rows, cols = part(T, S)

  def evaluate(masks):
    return {
      name: (
        mask.dense(T, S),
        mask.tile(jnp.arange(T)[rows], jnp.arange(S)[cols]),
      )
      for name, mask in masks.items()
    }

  found = {name: expressions(make_data(B, N, T, S))[name] for name in NAMES}
  if traced:
    return jax.jit(evaluate)(found)
  return jax.jit(lambda: evaluate(found))()


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('T, S', SIZES)
@pytest.mark.parametrize('name', NAMES)
def test_dense_and_tiles_follow_the_rule(name, T, S, traced):
  rows, cols = part(T, S)
  wanted = expected(T, S)[name]
  dense, tile = evaluated(T, S, traced)[name]
  assert dense.dtype == bool
  np.testing.assert_array_equal(np.broadcast_to(dense, wanted.shape), wanted)
  wanted = wanted[:, :, rows, cols]
  np.testing.assert_array_equal(np.broadcast_to(tile, wanted.shape), wanted)


@pytest.mark.parametrize('turned', [False, True])
def test_one_head_of_a_tile_as_a_kernel_reads_it(turned):
  """Arrays cut to a tile of two axes, in either order."""
  T, S = 15, 12
  rows, cols = slice(3, 12), slice(4, 9)
  turn = np.transpose if turned else np.asarray
  query = turn(np.arange(T)[rows, None])
  key = turn(np.arange(S)[None, cols])

  def cut(array, axes):
    at = {'B': B - 1, 'N': N - 1, 'T': rows, 'S': cols}
    sizes = dict(zip(axes, array.shape, strict=True))
    found = array[tuple(at[a] if n > 1 else 0 for a, n in sizes.items())]
    if np.ndim(found) == 1:
      found = found[:, None] if sizes.get('T', 1) > 1 else found[None]
    return jnp.asarray(turn(found) if np.ndim(found) else found)

  for name, mask in expressions(make_data(B, N, T, S)).items():
    if mask is None:
      continue
    found = masks.with_axes(cut, mask.elementwise(T, S))
    found = found.in_tile(jnp.asarray(query), jnp.asarray(key))
    wanted = np.broadcast_to(expected(T, S)[name], (B, N, T, S))
    wanted = turn(wanted[-1, -1, rows, cols])
    np.testing.assert_array_equal(
      np.broadcast_to(found, wanted.shape), wanted, name
    )


@pytest.mark.parametrize('T, S', [*SIZES, (14, 15)])
@pytest.mark.parametrize('name', NAMES)
def test_block_map_is_sound_and_exact_where_static(name, T, S):
  mask = expressions(make_data(B, N, T, S))[name]
  dense = expected(T, S)[name]
  for block_q, block_k in BLOCKS:
    found = mask.block_map(T, S, block_q, block_k)
    assert found.dtype == np.int8
    assert found.shape == (-(-T // block_q), -(-S // block_k))
    for i, j in np.ndindex(found.shape):
      tile = dense[
        :, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k
      ]
      kind = masks.FULL if tile.all() else masks.PARTIAL
      kind = kind if tile.any() else masks.EMPTY
      if name in EXACT or found[i, j] != masks.PARTIAL:
        assert found[i, j] == kind, (i, j)


@pytest.mark.parametrize('name', NAMES)
def test_queries_said_to_see_themselves_do(name):
  mask = expressions(make_data(B, N, 12, 12))[name]
  own = np.diagonal(expected(12, 12)[name], axis1=2, axis2=3).all()
  assert own or not mask.sees_itself()
  assert mask.sees_itself() or name not in ('causal', 'window')


def test_segments_of_one_array_are_those_of_two():
  ids = jnp.asarray([[3, 3, 1, 3], [0, 0, 0, 2]])
  one, two = masks.Segments(ids), masks.Segments(ids, ids)
  assert one.sees_itself() and not two.sees_itself()
  assert jax.jit(lambda mask: mask.sees_itself())(one)
  np.testing.assert_array_equal(one.dense(4, 4), two.dense(4, 4))
  rows = jnp.arange(2), jnp.arange(2, 4)
  assert one.maybe(*rows) == two.maybe(*rows)
  with pytest.raises(ValueError, match='key_ids has length 4 but S is 5'):
    one.dense(4, 5)
  both = masks.packed(masks.Causal(), ids)
  assert both.sees_itself() and masks.letters(both).right.query_ids == 'BT'


@pytest.mark.parametrize('name', NAMES)
def test_maybe_is_sound(name):
  T, S, block = 12, 12, 3
  mask = expressions(make_data(B, N, T, S))[name]
  dense = expected(T, S)[name]
  skipped = 0
  for i in range(0, T, block):
    for j in range(0, S, block):
      rows, cols = jnp.arange(i, i + block), jnp.arange(j, j + block)
      if not mask.maybe(rows, cols):
        skipped += 1
        assert not dense[:, :, i : i + block, j : j + block].any()
  traced = (
    'causal_traced',
    'window_traced',
    'segments',
    'segments_and_causal',
    'blocks_traced',
    'head_window_traced',
    'at',
  )
  if name in traced:
    assert skipped > 0


def test_combinations_keep_what_is_known():
  ids = jnp.zeros((1, 8), jnp.int32)
  segments, causal = masks.Segments(ids, ids), masks.Causal()
  empty, partial, full = masks.EMPTY, masks.PARTIAL, masks.FULL

  def kinds(mask):
    return mask.block_map(8, 8, 4, 4).tolist()

  assert kinds(causal) == [[partial, empty], [full, partial]]
  assert kinds(~causal) == [[partial, full], [empty, partial]]
  assert kinds(causal & segments) == [[partial, empty], [partial, partial]]
  assert kinds(causal | segments) == [[partial, partial], [full, partial]]
  assert kinds(causal & masks.Window(0, None)) == [
    [partial, empty],
    [empty, partial],
  ]


def test_block_map_of_a_long_sequence_is_cheap():
  T = 2**20
  kinds = masks.Window(1024, 0).block_map(T, T, 1024, 1024)
  assert kinds.shape == (1024, 1024)
  assert (kinds != masks.EMPTY).sum() == 2 * 1024 - 1


@pytest.mark.parametrize('name', NAMES)
def test_pytree_round_trip(name):
  mask = expressions(make_data(B, N, 5, 7))[name]
  leaves, tree = jax.tree.flatten(mask)
  assert all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
  assert jax.tree.structure(jax.tree.map(lambda _: 0, mask)) == tree
  rebuilt = jax.tree.unflatten(tree, leaves)
  assert vars(rebuilt).keys() - {'_static'} == vars(mask).keys()
  # Without arrays it is a key of caches, and may be one of dicts.
  if not leaves:
    assert {mask: 1}[rebuilt] == 1


@pytest.mark.parametrize('name', NAMES)
def test_letters_name_the_axes_that_are_not_broadcast(name):
  T, S = 5, 7
  mask = expressions(make_data(B, N, T, S))[name]
  sizes = dict(B=B, N=N, T=T, S=S)
  for array, letters in zip(
    jax.tree.leaves(mask), jax.tree.leaves(masks.letters(mask)), strict=True
  ):
    assert len(letters) == array.ndim
    for size, letter in zip(array.shape, letters, strict=True):
      if letter in 'BN':  # what `local_op` splits
        assert size == sizes[letter]


def test_python_offsets_are_static_and_arrays_are_traced():
  assert jax.tree.leaves(masks.Causal(3)) == []
  assert len(jax.tree.leaves(masks.Causal(jnp.int32(3)))) == 1
  maps = []

  @jax.jit
  def f(mask):
    maps.append(mask.block_map(8, 8, 4, 4))
    return mask.dense(8, 8)

  f(masks.Causal(0))
  f(masks.Causal(jnp.int32(0)))
  assert maps[0][0, 1] == masks.EMPTY
  np.testing.assert_array_equal(maps[1], masks.PARTIAL)


def test_a_new_mask_is_one_dataclass():
  @masks.expression
  class Strided(masks.Mask):
    stride: int

    def tile(self, rows, cols):
      return ((rows[:, None] - cols) % self.stride == 0)[None, None]

  mask = Strided(3) & masks.Causal()
  t = np.arange(7)
  expected = ((t[:, None] - t) % 3 == 0) & (t[:, None] >= t)
  np.testing.assert_array_equal(mask.dense(7, 7)[0, 0], expected)
  assert dataclasses.replace(Strided(3), stride=2).stride == 2
  assert mask.block_map(8, 8, 4, 4)[0, 1] == masks.EMPTY


def test_masks_are_frozen_and_combine_only_with_masks():
  with pytest.raises(dataclasses.FrozenInstanceError):
    masks.Causal().offset = 1
  with pytest.raises(TypeError):
    masks.Causal() & np.ones((2, 2), bool)


@pytest.mark.parametrize(
  'mask, message',
  [
    (
      masks.Segments(np.zeros((1, 3), np.int32), np.zeros((1, 7), np.int32)),
      'query_ids has length 3 but T is 5',
    ),
    (
      masks.Segments(np.zeros((1, 5), np.int32), np.zeros((1, 6), np.int32)),
      'key_ids has length 6 but S is 7',
    ),
    (masks.Dense(np.ones((4, 7), bool)), 'axis T .* is 4 but T is 5'),
    (masks.Dense(np.ones((5, 6), bool)), 'axis S .* is 6 but S is 7'),
    (masks.Dense(np.ones((1,) * 5, bool)), 'has 5 axes'),
  ],
)
def test_errors_name_the_axis(mask, message):
  with pytest.raises(ValueError, match=message):
    mask.dense(5, 7)
