"""Forms and gates of linear attention, by what they do and not by their name.

A gate is seen in the state S' = A(S, x) + W(x) after a token x: it forgets if
A is not the identity, and selects if its parameters change what is written
into an empty state.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from efficient_attn import ops
from efficient_attn.layers.mixers import MIXERS, build_mixer
from efficient_attn.models import cost
from efficient_attn.ops.recurrent.forms import FORMS
from experiments import page
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
)
from experiments.survey.sources import OURS

LENGTHS, WIDTHS, CHUNK = (4096, 16_384), (256, 1024), 64


def loops(jaxpr: core.Jaxpr) -> int:
  """Turns of loops that a program makes one after another."""
  turns = 0
  for eqn in jaxpr.eqns:
    inner = [
      getattr(x, 'jaxpr', x)
      for value in eqn.params.values()
      for x in (value if isinstance(value, tuple | list) else (value,))
      if isinstance(x, core.Jaxpr | core.ClosedJaxpr)
    ]
    within = sum(map(loops, inner))
    if eqn.primitive.name == 'scan':
      within = eqn.params['length'] * max(1, within)
    turns += within
  return turns


def one_head(length: int, width: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Queries, keys and values of one head."""
  return (jax.ShapeDtypeStruct((1, length, 1, width), jnp.float32),) * 3


def count(form: str, length: int, width: int, **options) -> dict[str, float]:
  """Operations of linear attention in a form, and its turns one by one."""
  op = functools.partial(
    ops.linear_attention, form=form, chunk_size=CHUNK, **options
  )
  x = one_head(length, width)
  jaxpr = jax.make_jaxpr(op)(*x).jaxpr
  return dict(operations=cost.count(op, *x).operations, turns=loops(jaxpr))


def costs() -> dict:
  """By form: exponents of operations in N and d, and turns of loops."""
  found = {}
  for name, form, options in (
    *((form, form, {}) for form in FORMS),
    ('without a mask', 'chunkwise', dict(bidirectional=True)),
  ):
    by_length = [count(form, n, 64, **options) for n in LENGTHS]
    by_width = [count(form, LENGTHS[0], d, **options) for d in WIDTHS]
    found[name] = dict(
      time_n=slope(LENGTHS, [c['operations'] for c in by_length]),
      time_d=slope(WIDTHS, [c['operations'] for c in by_width]),
      operations=by_length[0]['operations'],
      turns=by_length[0]['turns'],
    )
  return found


def step() -> dict[str, float]:
  """The operations of one token: the exponent in d, and in what was before."""

  def of(width):
    x = one_head(1, width)
    state = jax.eval_shape(ops.linear_attention, *x)[1]
    return cost.count(
      lambda state, *x: ops.linear_attention(*x, initial_state=state), state, *x
    ).operations

  return dict(time_d=slope(WIDTHS, [of(d) for d in WIDTHS]))


T, N, H = 48, 2, 8


def arrays(*shapes) -> list[jax.Array]:
  """Normal numbers of each shape."""
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def calls() -> dict[str, Callable]:
  """The op of each method that the source names, waiting for a form."""
  q, k, v, gate = arrays(*4 * [(1, T, N, H)])
  k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  decay = jax.nn.log_sigmoid(gate)
  channel, states = arrays((N, H), (1, T, H))
  recurrent = functools.partial(ops.linear_attention, q, k, v)
  return {
    'RetNet': functools.partial(
      recurrent, log_decay=jnp.log(jnp.array([0.9, 0.99]))
    ),
    'Mamba': functools.partial(
      ops.selective_scan,
      v,
      jax.nn.softplus(gate),
      -jnp.ones((N, H, H)),
      states,
      states,
    ),
    'Mamba2': functools.partial(recurrent, log_decay=decay[..., 0]),
    'RWKV-4': functools.partial(
      ops.wkv4, k, v, log_decay=-jnp.abs(channel), bonus=channel
    ),
    'RWKV-6': functools.partial(
      recurrent, log_decay=decay, bonus=channel, read='exclusive'
    ),
    'RWKV-7': functools.partial(
      ops.dplr, q, k, v, k, -0.5 * k, log_decay=decay
    ),
    'mLSTM': functools.partial(ops.mlstm, q, k, v, gate[..., 0], decay[..., 0]),
    'sLSTM': functools.partial(
      ops.slstm, q, k, v, gate, 0.1 * jnp.ones((4, N, H, H))
    ),
  }


def forms() -> dict[str, dict[str, float]]:
  """By method and form: how far its outputs are from those token by token."""
  found = {}
  for name, call in calls().items():
    wanted, _ = call(form='recurrent')
    found[name] = {}
    for form in FORMS:
      try:
        out, _ = call(form=form)
      except (NotImplementedError, ValueError):
        continue  # the op has no such form
      found[name][form] = largest(out, wanted)
  return found


# What decides how much is kept or written, by its names in our modules.
GATES = {
  'linear': (),
  'performer': (),
  'retention': (),
  'gla': ('gate',),
  'rwkv5': ('decay',),
  'rwkv6': ('decay', 'decay_down', 'decay_up'),
  'rwkv7': ('decay', 'decay_bias', 'rate', 'rate_bias'),
  'mamba': ('dt', 'dt_bias', 'a_log'),
  'mamba2': ('dt', 'dt_bias', 'a_log'),
  'mlstm': ('forget_gate', 'forget_bias', 'input_gate', 'input_bias'),
  'deltanet': ('beta',),
}
D, HEADS = 32, 2
EQUAL = 1e-4  # float32 rounds A and W to 1e-6


def moved(params, seed: int, names: Sequence[str] | None = None):
  """The parameters with noise in those of these names, or in all."""

  def shift(path, x):
    if names is not None and path[0].key not in names:
      return x
    noise = np.random.default_rng(seed).standard_normal(x.shape)
    return x + 0.1 * jnp.asarray(noise, x.dtype)

  return jax.tree_util.tree_map_with_path(shift, params)


def off(found, wanted) -> float:
  """The largest difference."""
  return float(jnp.abs(found - wanted).max())


def gates(name: str) -> dict[str, float]:
  """What a token does to the state of a row, as differences.

  forgets: of A from the identity; selects: of W with other gates; mixes: of A
  from a diagonal; by_token: of A between two tokens; by_channel: of A between
  the entries of a head's state.
  """
  module = build_mixer(name, d_model=D, num_heads=HEADS, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(module)
  params = moved(params, 1)  # none is at zero, as some begin
  x = np.random.default_rng(2).standard_normal((2, 1, 1, D))
  empty = module.init_cache(1, 1, jnp.float32)
  leaves, tree = jax.tree.flatten(empty)
  at = max(range(len(leaves)), key=lambda i: leaves[i].size)

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
    for p in (params, moved(params, 3, GATES[name]))
  ]
  return dict(
    forgets=max(off(rate, ones), off(mixed, ones)),
    selects=max(map(off, *written)),
    mixes=off(mixed, rate),
    by_token=off(rate, kept(second, ones)),
    by_channel=off(heads, heads[:, :1]),
  )


def measure() -> dict:
  """R41: costs by form, forms by method, gates by row."""
  return dict(
    costs=costs(),
    step=step(),
    forms=forms(),
    gates={name: gates(name) for name in GATES},
  )


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
      for name, row in ((name, values['gates'][name]) for name in names)
    )

  def judge(values):
    found = [
      (does(row, 'forgets'), does(row, 'selects')) == (forgets, selects)
      for row in (values['gates'][name] for name in names)
    ]
    return HOLDS if all(found) else RESTATED if any(found) else FAILS

  wanted = (
    f'the state is {"" if forgets else "not "}decayed, and what is written '
    f'{"depends" if selects else "does not depend"} on the parameters of gates'
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


NEAR = 0.15


def parallel(values) -> str:
  """Linear in N with a causal mask, or only without."""
  masked, free = (
    values['costs'][name] for name in ('parallel', 'without a mask')
  )
  if abs(masked['time_n'] - 1) < NEAR:
    return HOLDS
  linear = abs(free['time_n'] - 1) < NEAR and abs(free['time_d'] - 2) < NEAR
  return RESTATED if linear else FAILS


def recurrent(values) -> str:
  """d^2 a step, and no step dearer than another."""
  steps = values['costs']['recurrent']['time_n']
  power = values['step']['time_d']
  return HOLDS if abs(power - 2) < NEAR > abs(steps - 1) else FAILS


def hybrid(values) -> str:
  """Fewer turns than the recurrence, less work than the parallel form."""
  chunk, step, whole = (
    values['costs'][form] for form in ('chunkwise', 'recurrent', 'parallel')
  )
  fewer = whole['turns'] < chunk['turns'] < step['turns']
  return HOLDS if fewer and chunk['operations'] < whole['operations'] else FAILS


def shown_costs(values) -> str:
  """Exponents of the parallel form, masked and not."""
  return ', '.join(
    f'N^{row["time_n"]:.2f} d^{row["time_d"]:.2f} {said}'
    for row, said in (
      (values['costs']['parallel'], 'with a causal mask'),
      (values['costs']['without a mask'], 'without'),
    )
  )


def shown_step(values) -> str:
  """The exponent of a step in d, and of all steps in N."""
  steps = values['costs']['recurrent']['time_n']
  return f'd^{values["step"]["time_d"]:.2f} a step, N^{steps:.2f} for all'


def shown_turns(values) -> str:
  """Turns and operations by form."""
  return ', '.join(
    f'{form}: {values["costs"][form]["turns"]:,} turns, '
    f'{values["costs"][form]["operations"]:.2g} operations'
    for form in FORMS
  )


def lacking(values) -> dict[str, list[str]]:
  """The forms that a method has not, or not rightly."""
  return {
    name: missing
    for name, found in values['forms'].items()
    if (missing := [f for f in FORMS if not found.get(f, 1) < 1e-5])
  }


def shown_forms(values) -> str:
  """What is missing."""
  found = lacking(values)
  return (
    ', '.join(f'{name} is not {" or ".join(f)}' for name, f in found.items())
    or 'all'
  )


def all_forms(values) -> str:
  """Every method has every form."""
  return FAILS if lacking(values) else HOLDS


def differing(values) -> list[str]:
  """Rows whose gate is not that of the method table; a matrix has none."""
  return [
    name
    for name, row in values['gates'].items()
    if not does(row, 'mixes') and gate(row) != MIXERS[name].gate
  ]


def shown_gates(values) -> str:
  """The gate of each row."""
  return ', '.join(
    f'{name} {"matrix" if does(row, "mixes") else gate(row)}'
    for name, row in values['gates'].items()
  )


def gates_agree(values) -> str:
  """No row differs."""
  return FAILS if differing(values) else HOLDS


def tables(values) -> list:
  """Which method has which form, and what a token does to a state."""
  by_form = [
    [name, *(f'{row[f]:.0e}' if f in row else '' for f in FORMS)]
    for name, row in values['forms'].items()
  ]
  keys = ('forgets', 'selects', 'mixes', 'by_token', 'by_channel')
  by_gate = [
    [name, MIXERS[name].gate, *(f'{row[key]:.1g}' for key in keys)]
    for name, row in values['gates'].items()
  ]
  return [
    page.Table(['error by form', *FORMS], by_form),
    page.Table(
      [
        'state after a token, A(S) + W',
        'gate',
        'A is not 1',
        'W has a gate',
        'A is no diagonal',
        'A differs by token',
        'A differs in a head',
      ],
      by_gate,
    ),
    page.Text(
      'Forms: relative to the outputs token by token; empty where the op has '
      'no such form. Gates: largest differences, with random parameters; W has '
      'a gate if other parameters of the gates change it.',
      note=True,
    ),
  ]


FORM = 'S001 Computational Forms'
R41 = Claim(
  title='Forms and gates of linear attention',
  tier='b',
  measure=measure,
  seeds=(0, 1, 2, 3),
  parts=tables,
  statements=(
    Statement(
      says='The parallel form takes O(N d^2) in total',
      source=FORM,
      printed='O(Nd²) total',
      measured=shown_costs,
      judge=parallel,
      rule=f'exponents within {NEAR} with the causal mask that training a '
      'language model needs; restated if without it',
    ),
    Statement(
      says='The recurrent form takes O(d^2) per step',
      source=FORM,
      printed='O(d²) per step',
      measured=shown_step,
      judge=recurrent,
      rule=f'exponents within {NEAR} of 2, and of 1 in N over all steps',
    ),
    Statement(
      says='The chunkwise form is a hybrid of the other two',
      source=FORM,
      printed='Hybrid',
      measured=shown_turns,
      judge=hybrid,
      rule='its turns of loops lie between those of the two, and it has less '
      f'work than the parallel one: {LENGTHS[0]:,} tokens in chunks of {CHUNK}',
    ),
    Statement(
      says='All methods of linear attention have all three forms',
      source=f'{OURS}, on {FORM}',
      measured=shown_forms,
      judge=all_forms,
      rule='the op of each method that the source names runs in the form, and '
      'agrees with itself token by token to 1e-5',
    ),
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

LINEAR_FORMS = {'R41': R41}
