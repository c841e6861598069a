"""The folder that a script writes its results to."""

import contextlib
import pathlib
from collections.abc import Iterator

from efficient_attn.config import ConfigError
from efficient_attn.train.workdir import locked


@contextlib.contextmanager
def only_writer(out: pathlib.Path) -> Iterator[None]:
  """Creates `out` and keeps other processes from it.

  Raises:
    ConfigError: another process writes there, or nobody can.
  """
  with locked(out, '--out') as free:
    if not free:
      raise ConfigError(
        f'--out={str(out)!r}: another process writes there; wait for its end, '
        'or give another folder'
      )
    yield
