import jax
import jax.numpy as jnp
import pytest

from efficient_attn.train import machine


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setitem(machine.SIZES, 'cpu', (64, 2))
  machine.matmul_ceiling.cache_clear()
  yield
  machine.matmul_ceiling.cache_clear()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_ceiling_is_a_rate(dtype):
  assert 1e6 < machine.matmul_ceiling(dtype, 1) < 1e14
  assert machine.matmul_ceiling(dtype, 1) == machine.matmul_ceiling(dtype, 1)


def test_ceiling_measures_inside_a_mesh():
  with jax.set_mesh(jax.make_mesh((4, 2), ('fsdp', 'tensor'))):
    assert machine.matmul_ceiling('float32', 8) > 1e6


def test_ceiling_counts_the_devices_of_other_processes(monkeypatch):
  ticks = iter(range(1000))  # every measurement takes one second
  monkeypatch.setattr(machine.time, 'perf_counter', lambda: next(ticks))
  flops = 2 * 2 * 64**3
  assert machine.matmul_ceiling('float32', 8) == 8 * flops
  assert machine.matmul_ceiling('float32', 32) == 32 * flops


def test_memory_is_the_peak_of_the_process():
  before = machine.memory_in_use()
  jnp.ones((64, 1024, 1024)).block_until_ready()  # 256 MiB
  after = machine.memory_in_use()
  assert 10e6 < before < 1e12
  assert after >= 256e6
  assert machine.memory_in_use() >= after  # a peak does not fall


def test_memory_is_the_fullest_device(monkeypatch):
  class Device:
    def __init__(self, peak):
      self.peak = peak

    def memory_stats(self):
      return {'peak_bytes_in_use': self.peak}

  monkeypatch.setattr(jax, 'local_devices', lambda: [Device(5), Device(7)])
  assert machine.memory_in_use() == 7
