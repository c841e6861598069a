"""Eight fake CPU devices, so that sharding is tested on any machine."""

import gc
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

from efficient_attn.quick_compile import QUICK_COMPILE
from tests.rotation import choose

# Also what the scripts under test compile; see tests/optimized.py. The workers
# fill the cores, so that each compiles with one thread.
if os.environ['JAX_PLATFORMS'] == 'cpu':
  options = QUICK_COMPILE | {'xla_cpu_parallel_codegen_split_count': 1}
  flags = [f'--{name}={str(value).lower()}' for name, value in options.items()]
  os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *flags])

jax.config.update('jax_num_cpu_devices', 8)

# Many tests compile the same program: compile it once for all workers. Small
# ones compile as quickly as they are found.
cache = pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'jax'
for name, value in dict(
  jax_compilation_cache_dir=str(cache),
  jax_persistent_cache_min_compile_time_secs=0.1,
).items():
  jax.config.update(name, value)
  os.environ.setdefault(name.upper(), str(value))  # for scripts under test

# Tracing makes objects by the million, of which few are garbage: collecting as
# often as Python does by itself takes a fifth of the time.
gc.set_threshold(100_000, 20, 100)


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
  parser.addoption(
    '--part', metavar='K/N', help='the part K of N of the sweep too'
  )
  parser.addoption(
    '--share', metavar='K/N', help='only the part K of N of the rest'
  )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
  items[:], left_out = choose(
    items,
    everything=config.getoption('--all'),
    part=config.getoption('--part'),
    share=config.getoption('--share'),
    # Whoever names tests gets them all.
    turns=not config.getoption('keyword')
    and config.args_source != config.ArgsSource.ARGS,
  )
  config.hook.pytest_deselected(items=left_out)
  # One worker runs a file: its tests share fixtures, oracles and programs.
  for item in items:
    if not item.get_closest_marker('xdist_group'):
      file = item.nodeid.partition('::')[0]
      item.add_marker(pytest.mark.xdist_group(file))
