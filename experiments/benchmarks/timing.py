"""Timing side by side: the machine is noisy, so contenders take turns."""

import statistics
import time
from collections.abc import Callable, Collection

import jax

# Seconds between two turns: threads of some libraries keep a core busy for a
# while after their work.
PAUSE = 0.3


def interleaved(
  contenders: dict[str, Callable], rounds: int, dense: Collection[str] = ()
) -> dict[str, float]:
  """Returns each contender's median seconds over `rounds` turns.

  A contender takes no argument and returns arrays, which are waited for. Every
  one runs once before the clock starts. Those named in `dense` take turns among
  themselves, after the others: whoever comes after freed GiB is slowed down.
  """
  seconds = {}
  for last in (False, True):
    group = {n: run for n, run in contenders.items() if (n in dense) == last}
    seconds |= {name: [] for name in group}
    for run in group.values():
      jax.block_until_ready(run())
    for _ in range(rounds):
      for name, run in group.items():
        time.sleep(PAUSE)
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds[name].append(time.perf_counter() - start)
  return {name: statistics.median(found) for name, found in seconds.items()}
