"""The linear family: time against length, peers and the machine's ceiling.

Every op at B = 1, N = 8, H = V = 64: chunkwise against the recurrent scan,
against `jax.lax.associative_scan` where the transition is diagonal, and
against exact softmax attention, forward and with all gradients. On a CPU the
heads lie on one virtual device a core, as the trainer divides it.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import ops
from efficient_attn.models.cost import flops, largest_array
from experiments.benchmarks.division import over_heads
from experiments.benchmarks.linear_calls import CALLS, forward, gradients
from experiments.benchmarks.timing import interleaved
from experiments.errors import largest
from experiments.exponent import slope

LENGTHS = {
  'cpu': (512, 2048, 4096, 8192, 16384),
  'gpu': (4096, 16384),
  'tpu': (4096, 16384),
}
# Largest error of a right op: an accelerator rounds float32 factors.
TOLERANCE = {'cpu': 1e-4, 'gpu': 2e-2, 'tpu': 2e-2}
# Peers whose memory or time is out of hand past these lengths.
LIMITS = {'recurrent': 4096, 'associative': 2048, 'jax_nn': 4096}
DENSE = ('softmax_jax_nn',)
TIMED = ('linear_scalar', 'linear_channel', 'delta_scalar', 'delta_channel')


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite; times are medians in ms."""
  ceiling = matmul_speed(rounds)
  lengths = LENGTHS[jax.default_backend()]
  found = {'matmul_gflops': ceiling / 1e9}
  for direction, wrap in (('fwd', lambda run: run), ('fwd_bwd', gradients)):
    for length in lengths:
      timed = contenders(length, wrap)
      seconds = interleaved(timed, rounds, DENSE)
      for name, value in seconds.items():
        found[f'{name}_{direction}_{length}_ms'] = 1e3 * value
        print(f'{name:28}{direction:9}{length:6}{1e3 * value:10.1f} ms')
    for name in TIMED:
      key = f'{name}_chunkwise_{direction}'
      times = [found[f'{key}_{length}_ms'] for length in lengths]
      found[f'{key}_exponent'] = slope(lengths, times)
      run = wrap(forward(CALLS[name], 'chunkwise'))
      shapes = [abstract(CALLS[name], length) for length in lengths[-2:]]
      sizes = [largest_array(run, shape) for shape in shapes]
      found[f'{key}_memory_exponent'] = slope(lengths[-2:], sizes)
      speed = flops(run, shapes[-1]) / (times[-1] / 1e3)
      found[f'{key}_gflops'] = speed / 1e9
      found[f'{key}_of_matmul'] = speed / ceiling
  return found


def contenders(length: int, wrap) -> dict:
  """Returns what is timed at a length, each one checked."""
  found = {}
  for name in TIMED:
    call = CALLS[name]
    arrays = over_heads(call.arrays(length))
    chunkwise = jax.jit(wrap(forward(call, 'chunkwise')))
    found[f'{name}_chunkwise'] = functools.partial(chunkwise, arrays)
    peers = {'recurrent': forward(call, 'recurrent')}
    if call.op is ops.linear_attention:
      peers['associative'] = associative
    for peer, run in peers.items():
      if length <= LIMITS[peer]:
        run = jax.jit(wrap(run))
        check(chunkwise(arrays), run(arrays), name)
        found[f'{name}_{peer}'] = functools.partial(run, arrays)
  arrays = over_heads(CALLS['linear_none'].arrays(length))
  qkv = {name: arrays[name] for name in 'qkv'}
  softmax = {'blockwise': softmax_blockwise, 'jax_nn': softmax_jax_nn}
  for peer, run in softmax.items():
    if length <= LIMITS.get(peer, length):
      found[f'softmax_{peer}'] = functools.partial(jax.jit(wrap(run)), qkv)
  return found


def associative(arrays):
  """Linear attention by an associative scan over whole states."""
  q, k, v, gate = (arrays[name] for name in ('q', 'k', 'v', 'log_decay'))
  gate = gate if gate.ndim == 4 else gate[..., None]
  decay = jnp.exp(gate)[..., None]

  def combine(first, second):
    return first[0] * second[0], second[0] * first[1] + second[1]

  writes = k[..., None] * v[..., None, :]
  _, states = jax.lax.associative_scan(combine, (decay, writes), axis=1)
  return jnp.einsum('btnh,btnhv->btnv', q, states) * q.shape[-1] ** -0.5


def softmax_blockwise(arrays):
  """Our own exact attention in O(T) memory."""
  return ops.attention(
    *arrays.values(), mask=ops.masks.Causal(), implementation='blockwise'
  )


def softmax_jax_nn(arrays):
  """The exact attention of jax.nn."""
  return jax.nn.dot_product_attention(*arrays.values(), is_causal=True)


def check(actual, wanted, name) -> None:
  """Raises when a contender is wrong: a wrong op is not timed."""
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True
  ):
    error = largest(a, b)
    if not error < TOLERANCE[jax.default_backend()]:
      raise AssertionError(f'{name} is off by {error:.1e}')


def matmul_speed(rounds: int) -> float:
  """Returns the FLOP/s of a large float32 product on one device."""
  x = jnp.ones((2048, 2048))
  product = jax.jit(lambda x: x @ x)
  seconds = interleaved({'x': lambda: product(x)}, rounds)['x']
  return 2 * 2048**3 / seconds


def abstract(call, length):
  """Returns the shapes of a call."""
  return jax.eval_shape(lambda: call.arrays(length))
