"""Damaged data: one error for it."""

from efficient_attn.config import ConfigError


class BadDataError(ConfigError):
  """Data that cannot be read; the message names the file and the place.

  `data.load` raises it about what it can see, and iterators about the rest.
  """


def line(error: Exception) -> str:
  """Returns the first line of what a library says about an error."""
  return str(error).strip().partition('\n')[0] or type(error).__name__
