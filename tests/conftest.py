"""Eight fake CPU devices, so that sharding is tested on any machine."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Compiling for TPUs, which are not there, in several workers at once.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Devices that wait in a collective each hold a thread of XLA's pool.
os.environ.setdefault('PJRT_NPROC', '16')

import jax
import pytest

from efficient_attn.quick import QUICK

# Also what the scripts under test compile; see tests/optimized.py. The workers
# fill the cores, so that each compiles with one thread.
if os.environ['JAX_PLATFORMS'] == 'cpu':
  options = QUICK | {'xla_cpu_parallel_codegen_split_count': 1}
  flags = [f'--{name}={str(value).lower()}' for name, value in options.items()]
  os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])

jax.config.update('jax_num_cpu_devices', 8)

# Many tests compile the same program: compile it once for all workers.
cache = pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'
jax.config.update('jax_compilation_cache_dir', str(cache))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Frees what a module compiled.

  Each program holds memory mappings, of which Linux allows a process 65530;
  XLA dies of a segmentation fault past them.
  """
  yield
  jax.clear_caches()


def pytest_addoption(parser):
  parser.addoption(
    '--all', action='store_true', help='the exhaustive sweep too'
  )


def pytest_collection_modifyitems(config, items):
  if config.getoption('--all'):
    return
  skip = pytest.mark.skip(reason='part of the exhaustive sweep: pass --all')
  for item in items:
    if 'exhaustive' in item.keywords:
      item.add_marker(skip)
