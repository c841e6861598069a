"""Softmax attention, forward and with gradients: time and largest array."""

import functools

import jax
import numpy as np

from efficient_attn import ops
from efficient_attn.models.cost import largest_array
from experiments.benchmarks.timing import interleaved

LENGTHS = {'cpu': (1024, 4096), 'gpu': (4096, 16384), 'tpu': (4096, 16384)}
HEADS, HEAD_DIM = 8, 64


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite: causal, B = 1, N = 8, H = 64, float32 on CPU."""
  platform = jax.default_backend()
  dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  found = {}
  for length in LENGTHS[platform]:
    shape = (1, length, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = tuple(jax.random.normal(key, shape, dtype) for key in keys)
    for name, make in (('fwd', forward), ('fwd_bwd', gradients)):
      calls = {
        i: jax.jit(make(i)) for i in ('reference', 'blockwise', 'jax_nn')
      }
      check(calls, qkv)
      seconds = interleaved(
        {i: functools.partial(call, *qkv) for i, call in calls.items()}, rounds
      )
      for i, value in seconds.items():
        found[f'{i}_{name}_{length}_ms'] = 1e3 * value
  for name, make in (('fwd', forward), ('fwd_bwd', gradients)):
    found[f'blockwise_{name}_memory_slope'] = memory_slope(make('blockwise'))
  return found


def forward(implementation: str):
  """Returns a causal attention of q, k, v."""
  if implementation == 'jax_nn':
    return functools.partial(jax.nn.dot_product_attention, is_causal=True)
  return functools.partial(
    ops.attention, mask=ops.masks.Causal(), implementation=implementation
  )


def gradients(implementation: str):
  """Returns the gradients of a causal attention for q, k, v."""
  attend = forward(implementation)
  return jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2))


def check(calls, qkv) -> None:
  """Raises when a contender is wrong: a wrong op is not timed."""
  wanted = calls['reference'](*qkv)
  tolerance = 1e-4 if qkv[0].dtype == 'float32' else 5e-2
  for name, call in calls.items():
    for a, b in zip(
      jax.tree.leaves(call(*qkv)), jax.tree.leaves(wanted), strict=True
    ):
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      error = np.abs(a - b).max() / np.abs(b).max()
      if not error < tolerance:
        raise AssertionError(f'{name} is off by {error:.1e}')


def memory_slope(function) -> float:
  """Returns d log(largest array) / d log(T) from T = 4096 to 16384."""
  sizes = []
  for length in (4096, 16384):
    shape = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), 'float32')
    sizes.append(largest_array(function, *[shape] * 3))
  return float(np.log(sizes[1] / sizes[0]) / np.log(4))
