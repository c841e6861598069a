"""The cases that the tests of masks and of attention share."""

import functools

import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax import attention_blockwise as tiles
from efficient_attn.ops.softmax import attention_reference as dense


def with_lse(op):
  """An implementation that returns (out, lse), not (out, Stats)."""

  @functools.wraps(op)
  def run(*args, **options):
    out, stats = op(*args, **options)
    return out, stats.lse

  return run


attention_blockwise = with_lse(tiles.attention_blockwise)
attention_reference = with_lse(dense.attention_reference)


def make_data(B, N, T, S, seed=0):
  """What the masks of `expressions` and of `oracle.rules` are made of."""
  rng = np.random.default_rng(seed)
  return {
    'q_ids': np.sort(rng.integers(-1, 3, (B, T)), axis=1).astype(np.int32),
    'k_ids': np.sort(rng.integers(-1, 3, (B, S)), axis=1).astype(np.int32),
    'dense': rng.random((B, N, T, S)) < 0.4,
    'per_batch': rng.integers(-3, 4, B).astype(np.int32),
    # Places in a grid of 15 cells, as they are in packed sequences.
    'q_at': np.sort(rng.integers(0, 15, (B, T)), axis=1).astype(np.int32),
    'k_at': np.sort(rng.integers(0, 15, (B, S)), axis=1).astype(np.int32),
    'layout': rng.random((B, N, -(-T // 3), -(-S // 2))) < 0.15,
    'random': masks.random_blocks(8, 2, seed=1, causal=False),
    'left': rng.integers(0, 5, N).astype(np.int32),
    'right': rng.integers(-1, 3, N).astype(np.int32),
    'alpha': rng.integers(0, 4, N).astype(np.int32),
    'beta': rng.integers(0, 1025, N).astype(np.int32),
    'flags': np.arange(N) % 2 == 1,
  }


def make_arrays(T, S, *, N=4, K=2, H=4, V=3, B=2, dtype=np.float32, seed=0):
  """Random query, key and value."""
  rng = np.random.default_rng(seed)
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, V)]
  return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def expressions(data):
  """The expressions that should follow `oracle.rules`, by the same names."""
  segments = masks.Segments(data['q_ids'], data['k_ids'])
  dense = masks.Dense(data['dense'])
  causal = masks.Causal()
  return {
    'none': None,
    'unbounded': masks.Window(None, None),
    'nothing': masks.Dense(np.zeros((1, 1), bool)),
    'causal': causal,
    'causal_ahead': masks.Causal(3),
    'causal_behind': masks.Causal(-2),
    'causal_traced': masks.Causal(jnp.int32(-1)),
    'causal_per_batch': masks.Causal(jnp.asarray(data['per_batch'])),
    'window': masks.Window(2, 1),
    'window_left': masks.Window(3, None),
    'window_right': masks.Window(None, 2),
    'window_shifted': masks.Window(2, 1, offset=-3),
    'window_traced': masks.Window(2, 1, offset=jnp.int32(2)),
    'window_inverted': masks.Window(-3, 2),
    'window_and_causal': masks.Window(4, None) & causal,
    'segments': segments,
    'segments_and_causal': causal & segments,
    'segments_or_window': segments | masks.Window(1, 1),
    'dense': dense,
    'dense_heads': masks.Dense(data['dense'][0]),
    'dense_keys': masks.Dense(data['dense'][:, :1, :1]),
    'dense_or_causal': dense | causal,
    'not_causal': ~causal,
    'not_window': ~masks.Window(2, 1),
    'not_segments': ~segments,
  } | patterns(data)


def patterns(data):
  """Those that should follow the rules of `oracles.patterns`."""
  causal, flags, layout = masks.Causal(), data['flags'], data['layout']
  heads, window = masks.Heads(flags), masks.Window(2, 2)
  left, right = data['left'], data['right']
  at = jnp.asarray(data['q_at']), jnp.asarray(data['k_at'])
  plane = masks.Neighborhood((3, 5), (3, 3))
  return {
    'dilated': masks.Dilated(2, 1, 3),
    'strided': masks.Strided(4),
    'logsparse': masks.LogSparse(),
    'logsparse_local': causal & masks.LogSparse(3),
    'fixed': masks.Fixed(4, 2),
    'block_window': masks.BlockWindow(3, 1, 2),
    'prefix': masks.Prefix(3),
    'leading': masks.Leading(2),
    'global': masks.Global((5, 0)),
    'streaming': causal & masks.streaming(2, 3),
    'cascade': masks.cascade(1, 2, 2),
    'neighborhood_1d': masks.Neighborhood((15,), (4,)),
    'neighborhood_2d': plane,
    'neighborhood_3d': masks.Neighborhood((2, 4, 2), (3, 3, 1)),
    'neighborhood_tiles': masks.Neighborhood((2, 4), (1, 3), 2),
    'radial': masks.Radial(4, 4),
    'radial_far': masks.Radial(1, 16),
    'radial_wide': masks.Radial(4, 4, 2),
    'blocks': masks.Blocks(layout[0, 0], 3, 2),
    'blocks_heads': masks.Blocks(layout[0], 3, 2),
    'blocks_traced': masks.Blocks(jnp.asarray(layout), 3, 2),
    'random_blocks': masks.RandomBlocks(16, 2, 2, 1, False),
    'head_window': masks.HeadWindow(left, right),
    'head_window_traced': masks.HeadWindow(
      jnp.asarray(left), jnp.asarray(right)
    ),
    'elastic_window': masks.ElasticWindow(data['alpha'], data['beta']),
    'heads': heads & causal | ~heads & window,
    'heads_all': masks.Heads(flags | True),
    'at': masks.At(masks.Window(1, 1) | masks.Global((0,)), *at),
    'at_grid': masks.At(plane, *at),
  }


MASKS = list(expressions(make_data(1, 1, 1, 1)))

EXTRAS = {
  'plain': (),
  'bias': ('bias',),
  'cap': ('cap',),
  'sinks': ('sinks',),
  'all': ('bias', 'cap', 'sinks', 'scale'),
}


def make_extras(kind, B, N, T, S):
  """Keyword arguments of the op and of the oracle for one row of EXTRAS."""
  rng = np.random.default_rng(5)
  used = EXTRAS[kind]
  ours, theirs = {}, {}
  if 'bias' in used:
    slopes, table = rng.random(N), rng.standard_normal((N, 1, S))
    ours['bias'] = scores.Alibi(jnp.asarray(slopes)) + scores.Dense(
      jnp.asarray(table)
    )
    distance = np.abs(np.arange(T)[:, None] - np.arange(S))
    theirs['bias'] = np.broadcast_to(
      table - slopes[:, None, None] * distance, (B, N, T, S)
    )
  if 'cap' in used:
    ours['logits_soft_cap'] = theirs['cap'] = 1.5
  if 'sinks' in used:
    ours['sinks'] = jnp.asarray(rng.standard_normal(N))
    theirs['sinks'] = np.asarray(ours['sinks'])
  if 'scale' in used:
    ours['scale'] = theirs['scale'] = 0.7
  return ours, theirs
