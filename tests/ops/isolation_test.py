"""Nothing of another segment reaches a token, forward or backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops import delta_rule_cases as delta
from tests.ops import elementwise_cases as elementwise
from tests.ops import gated_recurrences_test as gated
from tests.ops import linear_attention_cases as linear
from tests.ops import log_linear_test as log_linear
from tests.ops import mesa_test as mesa

T, CHUNK = 24, 8
EDGE = np.repeat([5, 7, 2, 3], [5, 3, 8, 8])  # segment 2 is a chunk
WITHIN = np.repeat([5, 2, 7, 3], [7, 6, 4, 7])


def without_state(arrays):
  return {k: x for k, x in arrays.items() if k != 'initial_state'}


# Name -> (function of nothing to arrays, op, options).
OPS = {
  **{
    f'linear_{gate}': (
      lambda gate=gate: linear.make(gate, T)[0],
      linear.linear_attention,
      {},
    )
    for gate in linear.GATES
  },
  **{
    f'{op}_{gate}': (
      lambda op=op, gate=gate: delta.make(op, gate, T, state=False),
      delta.OPS[op],
      {},
    )
    for op, gate in delta.CASES
  },
  **{
    name: (lambda name=name: without_state(gated.make(name, T)[0]), op, {})
    for name, (op, *_) in gated.OPS.items()
  },
  **{
    name: (
      lambda name=name: elementwise.make(name, T, state=False)[0],
      op,
      options,
    )
    for name, (op, options) in elementwise.CASES.items()
  },
  'log_linear': (
    lambda: log_linear.make(T),
    log_linear.log_linear_attention,
    {},
  ),
  'mesa': (lambda: mesa.make(T), mesa.mesa_recurrence, {}),
}
# What would make the numbers of a segment grow past all bounds within it.
UNIT = {
  'delta': ('k', 'beta', 'erase'),
  'erase': ('k', 'beta', 'erase'),
  'dplr': ('k', 'a', 'b'),
  'mesa': ('k', 'beta'),
  'mlstm': ('q',),
}
FORMS = [
  pytest.param(
    name,
    form,
    marks=[]
    if form == 'chunkwise' or name == 'slstm'
    else pytest.mark.exhaustive,
  )
  for name in OPS
  for form in elementwise.FORMS.get(name, ('recurrent', 'chunkwise'))
  if form
]


@functools.partial(jax.jit, static_argnames=('name', 'form'))
def results(arrays, ids, counts, name, form):
  """Outputs that count, and the gradients of what belongs to tokens."""
  _, op, options = OPS[name]
  if name != 'slstm':
    options = options | {'form': form, 'chunk_size': CHUNK}

  def loss(arrays):
    out, _ = op(**arrays, segment_ids=ids, **options)
    out = jnp.where(counts.reshape(1, T, *[1] * (out.ndim - 2)), out, 0)
    return jnp.sum(jnp.sin(out)), out

  grads, out = jax.grad(loss, has_aux=True)(arrays)
  return out, {k: g for k, g in grads.items() if of_tokens(g)}


def of_tokens(x):
  return x.ndim > 2 and x.shape[1] == T


@pytest.mark.parametrize('name, form', FORMS)
def test_other_segments_do_not_matter(name, form):
  make = OPS[name][0]
  arrays = {k: np.asarray(x, np.float32) for k, x in make().items()}

  def run(ids, change):
    counts = ids == 2
    changed = {
      k: np.where(counts.reshape(1, T, *[1] * (x.ndim - 2)), x, change(k, x))
      if of_tokens(x)
      else x
      for k, x in arrays.items()
    }
    ids = np.tile(ids, (2, 1)).astype(np.int32)
    found = results(changed, ids, counts, name, form)
    return jax.tree.map(lambda x: np.asarray(x)[:, counts], found)

  def large(k, x):
    unit = UNIT.get(name.partition('_')[0], ())
    return x if k in unit else np.float32(1e18) * x

  def nan(_, x):
    return np.full_like(x, np.nan)

  for ids, change in ((WITHIN, large), (EDGE, nan)):
    found, expected = run(ids, change), run(ids, lambda k, x: x)
    found = jax.tree_util.tree_leaves_with_path(found)
    for (path, a), b in zip(found, jax.tree.leaves(expected), strict=True):
      np.testing.assert_allclose(
        a,
        b,
        rtol=0,
        atol=1e-5 * np.abs(b).max(),
        err_msg=f'{change.__name__} {jax.tree_util.keystr(path)}',
      )
