"""Sparse patterns as wholes: their size, their reach, their layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention_tiles import choose_tiles


def admitted(mask, T):
  """The pairs of a rule as a numpy matrix."""
  index = np.arange(T)
  found = mask.pairs(index[None, None, :, None], index[None, None, None])
  return np.broadcast_to(found, (1, 1, T, T))[0, 0]


def root(T):
  return int(np.sqrt(T))


# Exponents of the number of pairs, measured from 256 to 2048 tokens.
EXPONENTS = {
  'window': (1.00, lambda T: masks.Window(3, 3)),
  'star': (1.00, lambda T: masks.Window(1, 1) | masks.Global((0,))),
  'strided': (1.52, lambda T: masks.Strided(root(T))),
  'fixed': (1.51, lambda T: masks.Fixed(root(T), 1)),
  'logsparse': (1.16, lambda T: masks.LogSparse()),
  'full': (2.00, lambda T: masks.Window(None, None)),
}


@pytest.mark.parametrize('name', EXPONENTS)
def test_pairs_grow_with_the_exponent_of_the_paper(name):
  exponent, make = EXPONENTS[name]
  lengths = 2 ** np.arange(8, 12)
  counts = [admitted(make(T), T).sum() for T in lengths]
  slope = np.polyfit(np.log(lengths), np.log(counts), 1)[0]
  assert slope == pytest.approx(exponent, abs=0.005)


def test_radial_pairs_grow_as_t_log_t():
  # Twice the frames: a band more for every token, of as many keys.
  size = 8
  per_token = [
    admitted(
      masks.Radial(size, frames) & ~masks.Prefix(size), frames * size
    ).sum()
    / (frames * size)
    for frames in (16, 32, 64, 128)
  ]
  steps = np.diff(per_token)
  np.testing.assert_array_less(0, steps)
  assert steps.max() < 1.5 * steps.min()


def longest_path(mask, T):
  """The most hops that information needs from one token to another."""
  sees = admitted(mask, T) | np.eye(T, dtype=bool)
  reached, hops = sees, 1
  while not reached.all():
    wider = reached @ sees
    assert (wider != reached).any(), 'some tokens never meet'
    reached, hops = wider, hops + 1
  return hops


def test_longest_path():
  T, near = 60, masks.Window(2, 2)
  assert longest_path(near, T) == 30  # (T - 1) / 2, rounded up
  assert longest_path(near | masks.Global((7,)), T) == 2
  assert longest_path(masks.Strided(8), T) == 2
  assert longest_path(masks.Fixed(6, 1), T) == 2
  assert longest_path(masks.Dilated(2, 2, 3) | near, T) <= 12
  assert longest_path(masks.LogSparse(), T) <= np.log2(T) + 1


def test_fixed_leaves_a_part_of_a_block_that_nobody_sees():
  # Why a bidirectional one wants whole blocks: these have no summary.
  seen = admitted(masks.Fixed(8, 2), 21)
  np.testing.assert_array_equal(seen[:16, 16:], 0)


def test_printed_log_sparse_indices_are_wrong():
  """Fournier et al. print -2^floor(log2 i) for i - 2^floor(log2 i)."""
  T = 32
  seen = admitted(masks.LogSparse(0) & masks.Causal(), T)
  for i in range(1, T + 1):  # theirs count from 1
    e = int(np.log2(i))
    steps = [2**s for s in range(e)]
    corrected = {i - 2**e, *(i - s for s in steps), i} - {0}
    printed = {-(2**e), *(i - s for s in steps), i}
    found = {int(k) + 1 for k in np.flatnonzero(seen[i - 1])}
    assert found == corrected
    assert found != printed and min(printed) < 0


@pytest.mark.parametrize('causal', [False, True])
def test_random_blocks(causal):
  draw = functools.partial(masks.random_blocks, causal=causal)
  layout = draw(12, 3, seed=5)
  i, j = np.nonzero(layout)
  np.testing.assert_array_less(1, abs(i - j))
  np.testing.assert_array_less(0, j)
  np.testing.assert_array_less(j, i if causal else 11)
  room = np.clip(np.arange(12) - 2, 0, 3) if causal else 3
  np.testing.assert_array_equal(layout.sum(1), room)
  np.testing.assert_array_equal(layout, draw(12, 3, seed=5))
  assert (layout != draw(12, 3, seed=6)).any()
  if causal:  # decoding sees the blocks of the whole sequence
    np.testing.assert_array_equal(layout[:7, :7], draw(7, 3, seed=5))


def test_random_blocks_are_the_layout_they_draw():
  mask = masks.RandomBlocks(45, 4, 2, 3, True)
  layout = masks.random_blocks(12, 2, seed=3, causal=True)
  blocks = masks.Blocks(layout, 4, 4)
  np.testing.assert_array_equal(mask.dense(45, 45), blocks.dense(45, 45))
  np.testing.assert_array_equal(
    mask.block_map(45, 45, 8, 8), blocks.block_map(45, 45, 8, 8)
  )
  with pytest.raises(ValueError, match='draw them for 46 tokens'):
    mask.dense(46, 46)


def test_shifted_blocks():
  layout = masks.shifted_blocks(4, (0, 1, 3))
  for n, shift in enumerate((0, 1, 3)):
    for i in range(4):
      assert np.flatnonzero(layout[n, i]).tolist() == [(i + shift) % 4]


def test_packed_counts_from_the_start_of_a_segment():
  lengths = (5, 1, 7)
  ids = jnp.asarray(np.repeat([3, 9, 1], lengths))[None]
  rules = {
    'relative': masks.Window(2, 1),
    'absolute': masks.Window(1, 1) | masks.Global((0, 2)) | masks.Fixed(3, 1),
    'blocks': masks.RandomBlocks(13, 2, 1, 0, False) | masks.Window(0, 0),
    'heads': masks.Heads(np.array([True, False])) & masks.Prefix(2),
  }
  for name, rule in rules.items():
    packed = masks.packed(rule, ids)
    dense = np.array(jax.jit(lambda packed=packed: packed.dense(13, 13))())
    whole = np.asarray(jax.jit(lambda rule=rule: rule.dense(13, 13))())
    for start, stop in ((0, 5), (5, 6), (6, 13)):
      alone = whole[..., : stop - start, : stop - start]
      found = dense[..., start:stop, start:stop]
      np.testing.assert_array_equal(*np.broadcast_arrays(found, alone), name)
      dense[..., start:stop, start:stop] = False
    assert not dense.any()
  assert masks.packed(None, ids).dense(13, 13).sum() == 25 + 1 + 49


def sparse(T):
  """Patterns that visit few tiles, at T tokens."""
  return {
    'window': masks.Window(128, 128),
    'longformer': masks.Window(64, 64) | masks.Global((0,)),
    'bigbird': masks.RandomBlocks(T, 64, 3, 0, False) | masks.Window(64, 64),
    'streaming': masks.Causal() & masks.streaming(4, 128),
    'logsparse': masks.LogSparse(),
    'line': masks.Neighborhood((T,), (127,)),
    'plane': masks.Neighborhood((T // 32, 32), (7, 7)),
    'space': masks.Neighborhood((T // 512, 32, 16), (3, 5, 5)),
    'tiles': masks.Neighborhood((T // 256, 2, 2), (3, 3, 3), 64),
    'radial': masks.Radial(512, T // 512, 128),
  }


@pytest.mark.parametrize('name', sorted(sparse(4096)))
def test_visited_area_grows_with_the_length(name):
  def area(T):
    return choose_tiles(sparse(T)[name], T, T).elements

  T = 2**15
  growth = area(2 * T) / area(T)
  assert growth < {'logsparse': 2.3, 'radial': 2.6}.get(name, 2.1)
  assert area(T) < T * T / (2 if name == 'radial' else 10)


def test_block_maps_of_patterns_are_cheap():
  # As many pairs as evaluation one by one would take minutes for.
  T = 2**17
  for mask in (
    masks.Fixed(512, 8),
    masks.Radial(4096, 32),
    masks.Neighborhood((32, 64, 64), (3, 5, 5)),
    masks.RandomBlocks(T, 512, 3, 0, True),
    masks.Global((0, 5)),
  ):
    assert mask.block_map(T, T, 512, 256).shape == (256, 512)


@pytest.mark.parametrize(
  'mask, message',
  [
    (masks.Neighborhood((2, 3), (3, 3)), 'S is 7 but the grid .2, 3. of 1'),
    (masks.Blocks(np.ones((2, 2), bool), 3, 3), r'must end in .2, 3.'),
  ],
)
def test_errors(mask, message):
  with pytest.raises(ValueError, match=message):
    mask.dense(5, 7)


def test_rules_on_positions_need_positions():
  blocks = masks.Blocks(np.ones((2, 1, 2, 2), bool), 2, 2)
  index = jnp.zeros((1, 3), jnp.int32)
  with pytest.raises(NotImplementedError, match='2 batch elements'):
    masks.At(blocks, index, index).dense(3, 3)
  with pytest.raises(NotImplementedError, match='Dense is not a rule'):
    masks.At(masks.Dense(np.ones((3, 3), bool)), index, index).dense(3, 3)
