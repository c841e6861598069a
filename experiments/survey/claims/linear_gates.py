"""Gates of linear attention, by what they do and not by their name.

A token makes S' = A(S) + W of a state S. A row forgets if A is not the
identity, and selects if more than the parameters of keys and values change W.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.mixers import MIXERS, build_mixer
from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
)
from experiments.survey.sources import OURS

# The parameters of keys and values; all others are gates, or do not write.
KEYS_AND_VALUES = {
  'linear': ('qkv',),
  'performer': ('qkv', 'projection'),
  'retention': ('qkv',),
  'gla': ('qkv',),
  'rwkv5': ('key', 'value', 'shifts'),
  'rwkv6': ('key', 'value', 'shifts', 'shift_down', 'shift_up'),
  'rwkv7': ('key', 'value', 'mix', 'removal', 'replacement'),
  'mamba': ('value', 'conv', 'select'),
  'mamba2': ('x', 'bc', 'x_conv', 'bc_conv'),
  'mlstm': ('up', 'conv', 'query', 'key', 'value'),
  'deltanet': ('qkv',),
}
D, HEADS = 32, 2
EQUAL = 1e-4  # float32 rounds A and W to 1e-6


def moved(params, seed: int, but: Sequence[str] = ()):
  """The parameters with noise in all but those of these names."""

  def shift(path, x):
    if path[0].key in but:
      return x
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    return x + 0.1 * jnp.asarray(noise, x.dtype)

  return jax.tree_util.tree_map_with_path(shift, params)


def off(found, wanted) -> float:
  """The largest difference."""
  return float(jnp.abs(found - wanted).max())


def changes(name: str) -> dict[str, float]:
  """What a token does to the state of a row, as differences.

  forgets: of A from the identity; selects: of W when all parameters but those
  of keys and values change; mixes: of A from a diagonal; by_token: of A between
  two tokens; by_channel: of A between the entries of a head's state.
  """
  module = build_mixer(name, d_model=D, num_heads=HEADS, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(module)
  params = moved(params, 1)  # none is at zero, as some begin
  x = np.random.default_rng(2).standard_normal((2, 1, 1, D))
  empty = module.init_cache(1, 1, jnp.float32)
  leaves, tree = jax.tree.flatten(empty)
  at = int(np.argmax([leaf.size for leaf in leaves]))

  @jax.jit
  def states(params, token, memory):
    cache = jax.tree.unflatten(tree, [*leaves[:at], memory, *leaves[at + 1 :]])
    return jax.tree.leaves(nnx.merge(graphdef, params)(token, cache=cache)[1])

  @jax.jit
  def kept(token, change):
    """A applied to a change of the state."""
    new = functools.partial(states, params, token)
    return jax.jvp(new, (leaves[at],), (change,))[1][at]

  first, second = jnp.asarray(x, jnp.float32)
  ones = jnp.ones_like(leaves[at])
  signs = jnp.where(jnp.arange(ones.size) % 3 == 0, -1.0, 1.0)
  signs = signs.reshape(ones.shape)
  rate, mixed = kept(first, ones), kept(first, signs) * signs
  heads = rate.reshape(HEADS, -1)
  written = [
    states(p, first, leaves[at])
    for p in (params, moved(params, 3, KEYS_AND_VALUES[name]))
  ]
  return dict(
    forgets=max(off(rate, ones), off(mixed, ones)),
    selects=max(map(off, *written)),
    mixes=off(mixed, rate),
    by_token=off(rate, kept(second, ones)),
    by_channel=off(heads, heads[:, :1]),
  )


def measure() -> dict:
  """R42: the changes by each row."""
  return {name: changes(name) for name in KEYS_AND_VALUES}


def does(row: Mapping, what: str) -> bool:
  """Whether a difference is more than rounding."""
  return row[what] > EQUAL


def gate(row: Mapping) -> str:
  """The gate of a row as the method table calls it."""
  if does(row, 'by_channel'):
    return 'channel'
  if does(row, 'by_token'):
    return 'scalar'
  return 'constant' if does(row, 'forgets') else 'none'


def gated(
  says: str,
  printed: str,
  names: Sequence[str],
  forgets: bool,
  selects: bool,
  source: str = 'S001 Gating Mechanisms',
) -> Statement:
  """A cell of the gate table; restated if only some of our rows are so."""

  def measured(values):
    return ', '.join(
      f'{name}: A off by {row["forgets"]:.2g}, W by {row["selects"]:.2g}'
      for name, row in ((name, values[name]) for name in names)
    )

  def judge(values):
    found = [
      (does(row, 'forgets'), does(row, 'selects')) == (forgets, selects)
      for row in (values[name] for name in names)
    ]
    return HOLDS if all(found) else RESTATED if any(found) else FAILS

  wanted = (
    f'the state is {"" if forgets else "not "}decayed, and what is written '
    f'{"depends" if selects else "does not depend"} on more than keys and '
    'values'
  )
  return Statement(
    says=says,
    source=source,
    printed=printed,
    measured=measured,
    judge=judge,
    rule=f'{wanted}, by more than {EQUAL:g}'
    + '; restated if in some of these rows' * (len(names) > 1),
  )


def differing(values) -> list[str]:
  """Rows whose gate is not that of the method table; a matrix has none."""
  return [
    name
    for name, row in values.items()
    if not does(row, 'mixes') and gate(row) != MIXERS[name].gate
  ]


def shown_gates(values) -> str:
  """The gate of each row."""
  return ', '.join(
    f'{name} {"matrix" if does(row, "mixes") else gate(row)}'
    for name, row in values.items()
  )


def gates_agree(values) -> str:
  """No row differs."""
  return FAILS if differing(values) else HOLDS


def table(values) -> list:
  """What a token does to the state of each row."""
  keys = ('forgets', 'selects', 'mixes', 'by_token', 'by_channel')
  rows = [
    [name, MIXERS[name].gate, *(f'{row[key]:.1g}' for key in keys)]
    for name, row in values.items()
  ]
  head = [
    "S' = A(S) + W",
    'gate',
    'A is not 1',
    'W has a gate',
    'A is no diagonal',
    'A differs by token',
    'A differs in a head',
  ]
  note = (
    'Largest differences, with random parameters; W has a gate if '
    'more than the parameters of keys and values change it.'
  )
  return [page.Table(head, rows), page.Text(note, note=True)]


R42 = Claim(
  title='Gates of linear attention',
  tier='b',
  measure=measure,
  seeds=(0, 1, 2, 3),
  parts=table,
  statements=(
    gated(
      'Linear Transformer and Performer have no gates',
      'No Gates; Memory never forgets',
      ('linear', 'performer'),
      False,
      False,
      'S001 Gating Mechanisms; S003 Delta Rule & DeltaNet',
    ),
    *(
      gated(f'{title} has a forget gate only', 'Forget Only', rows, True, False)
      for title, rows in (
        ('RetNet', ('retention',)),
        ('Mamba', ('mamba',)),
        ('RWKV', ('rwkv5', 'rwkv6', 'rwkv7')),
      )
    ),
    gated(
      'GLA has a forget gate only',
      'Forget Only; learnable forget gates',
      ('gla',),
      True,
      False,
      'S001 Gating Mechanisms; S003 Gated Linear Attention (GLA)',
    ),
    *(
      gated(
        f'{title} has a forget and a select gate',
        'Forget + Select',
        (name,),
        True,
        True,
      )
      for title, name in (
        ('Mamba2', 'mamba2'),
        ('xLSTM (mLSTM)', 'mlstm'),
        ('DeltaNet', 'deltanet'),
      )
    ),
    Statement(
      says='The gates of the method table are those that are measured',
      source=f'{OURS}, on S001 Gating Mechanisms',
      measured=shown_gates,
      judge=gates_agree,
      rule='for every row whose A is diagonal',
    ),
  ),
)

LINEAR_GATES = {'R42': R42}
