"""Softmax attention, forward and with gradients: time and memory.

B = 1, N = 8, H = 64, causal. Contenders: `blockwise` and `reference`, the same
in XLA by jax.nn, on a GPU its cuDNN kernel, torch's fused kernel on a CPU where
torch is installed, and `blockwise`
under sparse masks, whose time should follow the tiles they visit. On a CPU the
heads lie on one virtual device a core, as the trainer divides it.
"""

import functools
import importlib.util
import os
import subprocess
import sys

import jax
import numpy as np

from efficient_attn import ops
from efficient_attn.models.cost import largest_array
from efficient_attn.ops import masks
from efficient_attn.ops.softmax.attention_tiles import choose_tiles
from experiments.benchmarks.division import over_heads
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope

LENGTHS = {
  'cpu': (1024, 2048, 4096, 8192, 16384),
  'gpu': (4096, 16384, 32768),
  'tpu': (4096, 16384, 32768),
}
# Who keep all logits; past this length they run out of memory.
DENSE = ('reference', 'jax_nn')
DENSE_LIMIT = 8192
HEADS, HEAD_DIM = 8, 64
JAX_NN = {'jax_nn': 'xla', 'cudnn': 'cudnn'}  # by contender


def random_blocks(length: int) -> masks.Mask:
  """A quarter of the blocks of 512 x 512, and the diagonal."""
  layout = np.random.default_rng(0).random((-(-length // 512),) * 2) < 0.25
  return masks.Causal() & masks.Blocks(
    layout | np.eye(len(layout), dtype=bool), 512, 512
  )


# By contender, the mask at a length.
SPARSE = {
  'window_256': lambda length: masks.Window(255, 0),
  'window_1024': lambda length: masks.Window(1023, 0),
  'blocks_quarter': random_blocks,
}


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite; times are medians in ms, memory in MiB."""
  platform = jax.default_backend()
  dtype = 'float32' if platform == 'cpu' else 'bfloat16'
  found = {}
  for length in LENGTHS[platform]:
    shape = (1, length, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = tuple(jax.random.normal(key, shape, dtype) for key in keys)
    qkv = over_heads(qkv)
    for name, make in (('fwd', forward), ('fwd_bwd', gradients)):
      timed = contenders(make, qkv, length == LENGTHS[platform][0])
      if platform == 'cpu' and importlib.util.find_spec('torch'):
        timed['torch'] = torch_call(timed['blockwise'], qkv, name == 'fwd_bwd')
      for i, value in interleaved(timed, rounds, DENSE).items():
        found[f'{i}_{name}_{length}_ms'] = 1e3 * value
        print(f'{i:16}{name:9}{length:6}{1e3 * value:10.1f} ms', flush=True)
  for name in SPARSE:
    found |= time_by_tiles(found, name, length)
  for name, make in (('fwd', forward), ('fwd_bwd', gradients)):
    found[f'blockwise_{name}_memory_slope'] = memory_slope(make('blockwise'))
  if platform == 'cpu':
    for name in ('blockwise', 'window_256', 'reference', 'jax_nn'):
      found[f'{name}_fwd_bwd_{DENSE_LIMIT}_peak_mib'] = peak(name, DENSE_LIMIT)
  return found


def contenders(make, qkv, checked: bool) -> dict:
  """Returns calls without arguments; a wrong one is not timed."""
  length = qkv[0].shape[1]
  names = ['blockwise', *SPARSE]
  if jax.default_backend() == 'gpu':
    names.append('cudnn')
  if length <= DENSE_LIMIT:
    names += DENSE
  calls = {name: functools.partial(jax.jit(make(name)), *qkv) for name in names}
  if checked:
    for name, call in calls.items():
      check(name, call, jax.jit(make(name, 'reference')), qkv)
  return calls


def forward(name: str, implementation: str | None = None):
  """Returns an attention of q, k, v by its name among the contenders."""
  if implementation is None and name in JAX_NN:
    return functools.partial(
      jax.nn.dot_product_attention,
      is_causal=True,
      implementation=JAX_NN[name],
    )
  if implementation is None:
    implementation = 'reference' if name == 'reference' else 'blockwise'

  def attend(q, k, v):
    mask = SPARSE.get(name, lambda length: masks.Causal())(q.shape[1])
    return ops.attention(q, k, v, mask=mask, implementation=implementation)

  return attend


def gradients(name: str, implementation: str | None = None):
  """Returns the gradients of the attention for q, k, v."""
  attend = forward(name, implementation)
  return jax.grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2))


def torch_call(ours, qkv, backward: bool):
  """Torch's fused attention on the same numbers, checked against ours."""
  os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # do not spin
  import torch

  arrays = [torch.from_numpy(np.array(x).swapaxes(1, 2)) for x in qkv]
  arrays = [x.contiguous().requires_grad_(backward) for x in arrays]

  def run():
    out = torch.nn.functional.scaled_dot_product_attention(
      *arrays, is_causal=True
    )
    if not backward:
      return out
    return torch.autograd.grad((out**2).sum(), arrays)

  theirs = [
    x.detach().numpy().swapaxes(1, 2) for x in (run() if backward else [run()])
  ]
  close('torch', theirs, jax.tree.leaves(ours()), 1e-4)

  def timed():
    run()
    return ()

  return timed


def check(name, call, reference, qkv) -> None:
  """Raises when a contender is wrong."""
  tolerance = 1e-4 if qkv[0].dtype == 'float32' else 5e-2
  close(
    name, jax.tree.leaves(call()), jax.tree.leaves(reference(*qkv)), tolerance
  )


def close(name, found, wanted, tolerance) -> None:
  """Raises where arrays differ by more than a part of the largest number."""
  for a, b in zip(found, wanted, strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    error = np.abs(a - b).max() / np.abs(b).max()
    if not error < tolerance:
      raise AssertionError(f'{name} is off by {error:.1e}')


def time_by_tiles(found, name: str, length: int) -> dict[str, float]:
  """Time over elements visited, relative to the same of the full mask."""
  visited = [
    choose_tiles(mask, length, length).elements
    for mask in (SPARSE[name](length), masks.Causal())
  ]
  part = visited[0] / visited[1]
  figures = {f'{name}_{length}_visited': part}
  for direction in ('fwd', 'fwd_bwd'):
    times = (found[f'{i}_{direction}_{length}_ms'] for i in (name, 'blockwise'))
    ratio = next(times) / next(times)
    figures[f'{name}_{direction}_{length}_time_by_visited'] = ratio / part
  return figures


def memory_slope(function) -> float:
  """Returns d log(largest array) / d log(T) from T = 4096 to 16384."""
  lengths = 4096, 16384
  shapes = [
    jax.ShapeDtypeStruct((1, n, HEADS, HEAD_DIM), 'float32') for n in lengths
  ]
  return slope(lengths, [largest_array(function, *[x] * 3) for x in shapes])


def peak(name: str, length: int) -> float:
  """Returns the MiB one call adds to a process of its own (Linux)."""
  module = 'experiments.benchmarks.attention_peak'
  command = [sys.executable, '-m', module, name, str(length)]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return float(done.stdout.split()[-1])
