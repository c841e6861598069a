"""What this machine can do: the matmul rate that MFU refers to, and memory."""

import functools
import os
import pathlib
import re
import resource
import statistics
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

# Large enough for the full rate: (matrix size, products a measurement).
SIZES = {'cpu': (768, 2), 'gpu': (8192, 16), 'tpu': (8192, 16)}
_REPEATS = 5


@functools.cache
def matmul_ceiling(
  dtype: str, num_devices: int, devices: tuple[jax.Device, ...] | None = None
) -> float:
  """Measures the FLOP/s of square matmuls on all devices at once.

  Args:
    dtype: of the factors, at the default matmul precision.
    num_devices: of the whole run. Where this process has fewer, its own are
      measured and the rest are taken to be like them.
    devices: of the run in this process; all by default.

  Returns:
    The rate of the `num_devices` together.
  """
  devices = (devices or jax.local_devices())[:num_devices]
  size, products = SIZES[devices[0].platform]

  @functools.partial(jax.shard_map, in_specs=P('all'), out_specs=P('all'))
  def chain(x):
    return jax.lax.fori_loop(0, products, lambda _, y: y @ x, x)

  with jax.set_mesh(jax.make_mesh((len(devices),), ('all',), devices=devices)):
    x = np.random.default_rng(0).standard_normal((size, size), np.float32)
    x = (x * size**-0.5).astype(dtype)  # scaled so that products stay finite
    x = jax.device_put(np.broadcast_to(x, (len(devices), *x.shape)), P('all'))
    run = jax.jit(chain)
    run(x).block_until_ready()
    seconds = []
    for _ in range(_REPEATS):
      start = time.perf_counter()
      run(x).block_until_ready()
      seconds.append(time.perf_counter() - start)
  return num_devices * products * 2 * size**3 / statistics.median(seconds)


def memory_available() -> int:
  """Returns the bytes that arrays may take, over all devices."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return sum(stat['bytes_limit'] - stat['bytes_in_use'] for stat in stats)
  return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def memory_total(devices: Sequence[jax.Device]) -> int:
  """Returns the bytes of devices here, or of the machine for a CPU."""
  stats = [device.memory_stats() for device in devices]
  if all(stats):
    return sum(stat['bytes_limit'] for stat in stats)
  return host_memory()


def host_memory() -> int:
  """Returns the bytes of this machine, without starting a device."""
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')


def memory_in_use() -> int:
  """Returns peak bytes: of the fullest local device, or of the process."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  if all(stats):
    return max(stat['peak_bytes_in_use'] for stat in stats)
  status = pathlib.Path('/proc/self/status')
  if status.exists():
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)', status.read_text())[1])
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak
