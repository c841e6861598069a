"""The three forms of linear attention: what they cost, and who has them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from efficient_attn import ops
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


def one_token(state, *qkv):
  """What linear attention makes of a state and a token."""
  return ops.linear_attention(*qkv, initial_state=state)


def step() -> dict[str, float]:
  """The exponent in d of the operations of one token."""
  counts = []
  for width in WIDTHS:
    x = one_head(1, width)
    state = jax.eval_shape(ops.linear_attention, *x)[1]
    counts.append(cost.count(one_token, state, *x).operations)
  return dict(time_d=slope(WIDTHS, counts))


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
      except NotImplementedError:
        continue  # the op has no such form
      found[name][form] = largest(out, wanted)
  return found


# What decides how much is kept or written, by its names in our modules.


def measure() -> dict:
  """R41: costs by form, and forms by method."""
  return dict(costs=costs(), step=step(), forms=forms())


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


def tables(values) -> list:
  """Which method has which form."""
  rows = [
    [name, *(f'{row[f]:.0e}' if f in row else '' for f in FORMS)]
    for name, row in values['forms'].items()
  ]
  note = (
    'Largest errors over the largest number, of float32, against the outputs '
    'token by token; empty where the op has no such form.'
  )
  return [
    page.Table(['error by form', *FORMS], rows),
    page.Text(note, note=True),
  ]


FORM = 'S001 Computational Forms'
R41 = Claim(
  title='Forms of linear attention',
  tier='b',
  measure=measure,
  seeds=(0,),
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
  ),
)

LINEAR_FORMS = {'R41': R41}
