"""What the scripts in `launch/` share: flags, one-line errors, the devices.

Nothing here starts a device, so that scripts can set them up first.
"""

import argparse
import contextlib
import os
import sys

import jax

from efficient_attn import config as configs
from efficient_attn import config_files
from efficient_attn.config import Config, ConfigError


def parse_config(
  parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[Config, argparse.Namespace]:
  """Adds --config and --config.key=value to a parser, and reads them.

  Returns:
    The resolved config and the other flags.

  Raises:
    ConfigError: the file, a key or a value is wrong.
  """
  parser.add_argument(
    '--config',
    required=True,
    help='configs/**/x.py[:arg], or the config.json of a run; '
    '--config.model.d_model=128 changes a key',
  )
  args, changes = parse_changes(parser, argv)
  values = configs.override(config_files.load(args.config), changes)
  return configs.resolve(values), args


def parse_changes(
  parser: argparse.ArgumentParser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, dict[str, str]]:
  """Reads a parser's flags, and --config.key=value as {key: value}."""
  args, rest = parser.parse_known_args(argv)
  changes = {}
  for flag in rest:
    key, equals, value = flag.removeprefix('--config.').partition('=')
    if not flag.startswith('--config.') or not equals:
      raise ConfigError(
        f'{flag}: unknown flag; a key is set by --config.key=value'
      )
    changes[key] = value
  return args, changes


@contextlib.contextmanager
def clear_errors():
  """Ends the program with one line when the user is wrong or interrupts it.

  Any other exception is a bug and keeps its traceback.
  """
  try:
    yield
  except ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    raise SystemExit(2) from None
  except KeyboardInterrupt:
    print('interrupted; run the same command again', file=sys.stderr)
    raise SystemExit(130) from None


def cpu_devices(config: Config, cores: int) -> int:
  """Returns how many virtual CPU devices serve a run best.

  XLA runs small batched matmuls on one core, so one device a core is faster as
  long as each gets whole rows of a micro-batch.
  """
  if config.cpu_devices:
    return config.cpu_devices
  rows = config.batch_size // config.accumulate
  return max(n for n in range(1, cores + 1) if rows % n == 0)


def count_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def use_cpu_devices(devices: int, collectives: bool = True) -> None:
  """Divides the CPU into virtual devices, before JAX's first use.

  Args:
    devices: how many.
    collectives: whether they wait for each other. One that does occupies a
      thread of XLA's pool, and the last one may wait for a helper: there is one
      more then, which makes whatever runs on every core slower.
  """
  jax.config.update('jax_num_cpu_devices', devices)
  threads = max(count_cores(), devices + collectives)
  os.environ.setdefault('PJRT_NPROC', str(threads))


def start_devices(config: Config) -> None:
  """Sets up JAX's devices; call it before anything touches them.

  Several processes find each other through JAX_COORDINATOR_ADDRESS. It is
  `auto` under SLURM and on TPU slices, where JAX knows the rest, and elsewhere
  the host:port of the first, beside JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  address = os.environ.get('JAX_COORDINATOR_ADDRESS')
  use_cpu_devices(cpu_devices(config, 1 if address else count_cores()))
  if address == 'auto':
    del os.environ['JAX_COORDINATOR_ADDRESS']  # JAX would call it up
    jax.distributed.initialize()
  elif address:
    jax.distributed.initialize(
      address,
      int(os.environ['JAX_NUM_PROCESSES']),
      int(os.environ['JAX_PROCESS_ID']),
    )
