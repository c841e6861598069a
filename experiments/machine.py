"""Where and with what a figure was measured."""

import datetime
import importlib.metadata
import platform

import jax

from efficient_attn import cli


def machine() -> dict:
  """Returns the date, the device and the versions of what runs on it."""
  return dict(
    date=datetime.date.today().isoformat(),
    device=jax.devices()[0].device_kind.lower().replace(' ', '_'),
    cores=cli.count_cores(),
    python=platform.python_version(),
    versions={
      name: importlib.metadata.version(name)
      for name in ('jax', 'flax', 'optax')
    },
  )
