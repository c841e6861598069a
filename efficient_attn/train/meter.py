"""How fast a run is: rates, the share spent on data, MFU, memory."""

import contextlib
import time

import jax

from efficient_attn.config import Config
from efficient_attn.models.spec import KINDS
from efficient_attn.train.machine import matmul_ceiling, memory_in_use


class Meter:
  """Measures between reports; what is paused or compiled does not count.

  MFU is the FLOPs of the products of a training step, taken as three forward
  passes, over what the devices reach on large matmuls of the same dtype.
  """

  def __init__(
    self, config: Config, forward_flops: float | None, mesh: jax.sharding.Mesh
  ):
    self._unit = KINDS[config.model.name].unit
    self._dtype = config.model.dtype
    self._flops = None if forward_flops is None else 3 * forward_flops
    self._mesh = mesh
    self.compile_seconds = None

  def start(self, step: int) -> None:
    """Begins a span after `step` steps."""
    self._step, self._start = step, time.perf_counter()
    self._data = 0.0

  @contextlib.contextmanager
  def waiting_for_data(self):
    """Counts the time inside as time spent on data."""
    start = time.perf_counter()
    yield
    self._data += time.perf_counter() - start

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time inside out."""
    start = time.perf_counter()
    yield
    self._start += time.perf_counter() - start

  def compiled(self, step: int, params) -> None:
    """Ends the first step: notes its time and measures the ceiling of MFU.

    Args:
      step: of `params`, which may be ahead of the one that is reported.
      params: waited for, as the next step must not share the ceiling.
    """
    self.compile_seconds = time.perf_counter() - self._start
    jax.block_until_ready(params)
    if self._flops is not None:
      self._ceiling = matmul_ceiling(
        self._dtype, self._mesh.size, tuple(self._mesh.local_devices)
      )
    self.start(step)

  def rates(self, step: int, read: float) -> dict[str, float]:
    """Returns the rates since the last reading, and begins a new span.

    Args:
      step: the last step of the span.
      read: how many tokens or images a step reads.
    """
    steps = step - self._step
    found = dict(memory_gib=memory_in_use() / 2**30)
    if steps > 0:  # else the span began after this step
      seconds = (time.perf_counter() - self._start) / steps
      found['step_seconds'] = seconds
      found['data_seconds'] = self._data / steps
      found[f'{self._unit}_per_second'] = read / seconds
      if self._flops is not None:
        found['mfu'] = self._flops / seconds / self._ceiling
      self.start(step)
    return found
