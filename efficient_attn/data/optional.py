"""Packages of the optional extra `hf`, imported only when a run needs them."""

import importlib

from efficient_attn.config import ConfigError


def require(module: str, key: str, value: str):
  """Returns the imported `module`, which `key=value` of the config needs."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ConfigError(
      f'{key}={value!r} needs the package {module.partition(".")[0]!r}; '
      "pip install 'efficient_attn[hf]'"
    ) from error
