"""Errors of every form and dtype against the recurrence in float64.

For each op: the norm of the error of the output and of the gradients over the
norm of what is right, and its ratio to that of a plain recurrence in the same
dtype: for ops with a matrix state one written here in the normal form, with
everything in that dtype; for the others their own recurrent form. Of gradients
the worst counts. The last columns are ratios of largest errors, which depend on
the order in which the matmuls of a machine sum: the recurrence multiplies
matrices by vectors, the other forms by matrices.
"""

import concurrent.futures
import functools
import itertools
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import cli
from efficient_attn.ops.recurrent.forms import FORMS
from experiments.benchmarks import linear_calls, recurrent_calls
from experiments.errors import largest, relative

LENGTH, HEADS, WIDTH = 500, 2, 64
DTYPES = ('float32', 'bfloat16')


def measure(rounds: int) -> dict[str, float]:
  """Prints the table and returns the figures; medians over `rounds` seeds."""
  found = {}
  print(
    f'{"op":21}{"form":11}{"dtype":9}  out     /plain   grad    /plain   '
    'largest: out  grad'
  )
  # Most of the time goes into tracing and compiling: a process an op.
  jobs = itertools.product(cases(), DTYPES, [rounds])
  with concurrent.futures.ProcessPoolExecutor(
    min(8, cli.count_cores()), multiprocessing.get_context('spawn')
  ) as pool:
    for figures, lines in pool.map(measure_op, *zip(*jobs, strict=True)):
      print('\n'.join(lines), flush=True)
      found |= figures
  return found


def measure_op(name: str, dtype: str, rounds: int) -> tuple[dict, list[str]]:
  """Returns the figures of one op in one dtype, and lines that show them."""
  found, lines = {}, []
  draw, contenders = cases()[name]
  runs = {form: both(run) for form, run in contenders(dtype).items()}
  wanted = both(contenders('float64')['plain'])
  seeds = [errors(draw(seed), runs, wanted, dtype) for seed in range(rounds)]
  medians = {k: np.median([s[k] for s in seeds], 0) for k in runs}
  base = medians.pop('plain')
  for form, error in medians.items():
    norms, most = error
    ratio, most_ratio = error / base
    lines.append(
      f'{name:21}{form:11}{dtype:9}  {norms[0]:.1e}  {ratio[0]:4.2f}   '
      f'  {norms[1]:.1e}  {ratio[1]:4.2f}              '
      f'{most_ratio[0]:4.2f}  {most_ratio[1]:4.2f}'
    )
    for i, what in enumerate(('out', 'grad')):
      key = f'{name}_{form}_{dtype}_{what}'
      found[key] = norms[i]
      found[f'{key}_over_plain'] = ratio[i]
      found[f'{key}_largest'] = most[i]
      found[f'{key}_largest_over_plain'] = most_ratio[i]
  return found, lines


def cases() -> dict:
  """Returns name: (seed -> arrays, dtype -> contenders by form)."""
  found = {}
  for name, call in linear_calls.CALLS.items():

    def matrix(dtype, call=call):
      runs = {form: linear_calls.forward(call, form) for form in FORMS}
      return runs | {'plain': linear_calls.plain(call, dtype)}

    draw = functools.partial(call.arrays, LENGTH, heads=HEADS, width=WIDTH)
    found[name] = (lambda seed, draw=draw: draw(seed=seed)), matrix
  for name in recurrent_calls.CALLS:

    def other(dtype, name=name):
      del dtype  # the arrays have it
      form = recurrent_calls.FORM.get(name, 'chunkwise')
      forms = {form: form, 'plain': 'recurrent'}
      return {k: recurrent_calls.forward(name, f) for k, f in forms.items()}

    found[name] = functools.partial(draw_other, name), other
  return found


def draw_other(name: str, seed: int):
  """Returns the arrays of an op without a matrix state."""
  return recurrent_calls.arrays(name, LENGTH, HEADS, WIDTH, seed)


def errors(arrays, runs, wanted, dtype) -> dict[str, list[list[float]]]:
  """Returns of each contender ((output, gradients) by norm, by largest)."""
  low = {
    # Gates stay float32 in every dtype.
    name: x if 'log_' in name else jax.tree.map(lambda a: a.astype(dtype), x)
    for name, x in arrays.items()
  }
  with jax.enable_x64(True):
    exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), low)
    expected = jax.tree.map(np.asarray, wanted(exact))
  found = {}
  for name, run in runs.items():
    pairs = list(zip(run(low), expected, strict=True))
    found[name] = [
      [max(map(error, *map(jax.tree.leaves, pair))) for pair in pairs]
      for error in (relative, largest)
    ]
  return found


def both(run):
  """Returns the output and the gradients, compiled."""
  gradients = linear_calls.gradients(run)
  return jax.jit(lambda arrays: (run(arrays), gradients(arrays)))
