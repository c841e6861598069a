"""The cases that the tests of masks and of attention share."""

import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import masks, scores


def make_data(B, N, T, S, seed=0):
  """What the masks of `expressions` and of `oracle.rules` are made of."""
  rng = np.random.default_rng(seed)
  return {
    'q_ids': np.sort(rng.integers(-1, 3, (B, T)), axis=1).astype(np.int32),
    'k_ids': np.sort(rng.integers(-1, 3, (B, S)), axis=1).astype(np.int32),
    'dense': rng.random((B, N, T, S)) < 0.4,
    'per_batch': rng.integers(-3, 4, B).astype(np.int32),
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
