"""Errors of every form and dtype against the recurrence in float64.

For each op: the largest error of the output and of the gradients, relative to
the largest value, and its ratio to that of the plain recurrence, written here
once in the normal form, with everything in the same dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.forms import FORMS
from experiments.benchmarks.linear_calls import CALLS, forward, gradients, plain

LENGTH, HEADS, WIDTH = 500, 2, 64
DTYPES = ('float32', 'bfloat16')


def measure(rounds: int) -> dict[str, float]:
  """Prints the table and returns the figures; medians over `rounds` seeds."""
  found = {}
  print(f'{"op":15}{"form":11}{"dtype":9}  out     /plain   grad    /plain')
  for name, call in CALLS.items():
    for dtype in DTYPES:
      contenders = {form: forward(call, form) for form in FORMS}
      contenders['plain'] = plain(call, dtype)
      seeds = [errors(call, contenders, dtype, s) for s in range(rounds)]
      medians = {k: np.median([s[k] for s in seeds], 0) for k in contenders}
      base = medians.pop('plain')
      for form, error in medians.items():
        ratio = error / base
        print(
          f'{name:15}{form:11}{dtype:9}  {error[0]:.1e}  {ratio[0]:4.2f}   '
          f'  {error[1]:.1e}  {ratio[1]:4.2f}'
        )
        key = f'{name}_{form}_{dtype}'
        found[f'{key}_out'], found[f'{key}_grad'] = error
        found[f'{key}_out_over_plain'] = ratio[0]
        found[f'{key}_grad_over_plain'] = ratio[1]
  return found


def errors(call, contenders, dtype, seed) -> dict[str, tuple[float, float]]:
  """Returns the errors (output, gradients) of each contender."""
  arrays = call.arrays(LENGTH, heads=HEADS, width=WIDTH, seed=seed)
  low = {
    # Gates stay float32 in every dtype.
    name: x if name == 'log_decay' else x.astype(dtype)
    for name, x in arrays.items()
  }
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), low)
    wanted = both(plain(call, 'float64'))(exact)
    wanted = jax.tree.map(np.asarray, wanted)
  found = {}
  for name, run in contenders.items():
    actual = both(run)(low)
    found[name] = tuple(
      max(map(relative, jax.tree.leaves(x), jax.tree.leaves(y)))
      for x, y in zip(actual, wanted, strict=True)
    )
  return found


def both(run):
  """Returns the output and the gradients, compiled."""
  return jax.jit(lambda arrays: (run(arrays), gradients(run)(arrays)))


def relative(actual, wanted) -> float:
  """Returns the largest error over the largest value."""
  error = np.abs(np.asarray(actual, np.float64) - wanted).max()
  return float(error / np.abs(wanted).max())
