"""Sub-quadratic mixers: time of a layer against the length.

B = 1, N = 8, H = 64, d_model = 512, forward and with all gradients, projections
included. The exponent is the slope of log time in log T over all lengths.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers import MIXERS, build_mixer
from efficient_attn.models import jit_init
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope

LENGTHS = {
  'cpu': (1024, 2048, 4096, 8192, 16384),
  'gpu': (4096, 8192, 16384, 32768),
  'tpu': (4096, 8192, 16384, 32768),
}
HEADS, WIDTH = 8, 512
# Rows and their options; 'attention' is what they are measured against.
ROWS = {
  'attention': dict(implementation='blockwise'),
  'longformer': dict(window=256, num_global=1, implementation='blockwise'),
  'bigbird': dict(block_size=64, num_random=3, implementation='blockwise'),
  'moba': dict(block_size=256, top_k=3),
  'nsa': dict(top_k=8, window=256),
  'reformer': dict(),
  'linformer': dict(max_len=16384),
  'nystrom': dict(),
}


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite; times are medians in ms."""
  found = {}
  lengths = LENGTHS[jax.default_backend()]
  mixers = {name: make(name) for name in ROWS}
  for length in lengths:
    x = jax.random.normal(jax.random.key(1), (1, length, WIDTH))
    timed = {
      name: functools.partial(gradients, mixer, x)
      for name, mixer in mixers.items()
    }
    for name, seconds in interleaved(timed, rounds).items():
      found[f'{name}_fwd_bwd_{length}_ms'] = 1e3 * seconds
      print(f'{name:12}{length:6}{1e3 * seconds:10.1f} ms', flush=True)
  for name in ROWS:
    times = [found[f'{name}_fwd_bwd_{length}_ms'] for length in lengths]
    found[f'{name}_fwd_bwd_exponent'] = slope(lengths, times)
    ratio = found[f'attention_fwd_bwd_{lengths[-1]}_ms'] / times[-1]
    found[f'{name}_over_attention_{lengths[-1]}'] = ratio
  return found


def make(name: str) -> nnx.Module:
  """Builds a row; a decoder's mixer where there is one."""

  def build(key):
    return build_mixer(
      name,
      d_model=WIDTH,
      num_heads=HEADS,
      causal=MIXERS[name].causal,
      rngs=nnx.Rngs(key),
      **ROWS[name],
    )

  return jit_init(build)(jax.random.key(0))


@jax.jit
def gradients(mixer, x):
  """The gradients of the parameters and the input."""
  return jax.grad(lambda m, x: jnp.sum(m(x)[0] ** 2), (0, 1))(mixer, x)
