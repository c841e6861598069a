"""Timing side by side: the machine is noisy, so contenders take turns."""

import concurrent.futures
import statistics
import time
from collections.abc import Callable, Collection

import jax

# Seconds between two turns: threads of some libraries keep a core of a CPU busy
# for a while after their work.
PAUSE = 0.3
# In a turn of an accelerator, which is done before the next call is started.
CALLS = 5


def interleaved(
  contenders: dict[str, Callable], rounds: int, dense: Collection[str] = ()
) -> dict[str, float]:
  """Returns each contender's median seconds over `rounds` turns.

  A contender takes no argument and returns arrays, which are waited for. Every
  one runs once before the clock starts. Those named in `dense` take turns among
  themselves, after the others: whoever comes after freed GiB is slowed down.
  """
  cpu = jax.default_backend() == 'cpu'
  calls = 1 if cpu else CALLS
  seconds = {}
  for last in (False, True):
    group = {n: run for n, run in contenders.items() if (n in dense) == last}
    seconds |= {name: [] for name in group}
    if cpu or last:
      for run in group.values():
        jax.block_until_ready(run())
    else:  # compilers of accelerators take long, on one core each
      with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: jax.block_until_ready(run()), group.values()))
    for _ in range(rounds):
      for name, run in group.items():
        time.sleep(PAUSE * cpu)
        start = time.perf_counter()
        for _ in range(calls):
          result = run()
        jax.block_until_ready(result)
        seconds[name].append((time.perf_counter() - start) / calls)
  return {name: statistics.median(found) for name, found in seconds.items()}
