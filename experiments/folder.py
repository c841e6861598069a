"""The folder that a script writes its results to."""

import contextlib
import errno
import fcntl
import pathlib
from collections.abc import Iterator

from efficient_attn.config import ConfigError

# What a file system without locks says.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def only_writer(out: pathlib.Path) -> Iterator[None]:
  """Creates `out` and keeps other processes from it; a crash frees it.

  Raises:
    ConfigError: another process writes there, or nobody can.
  """
  try:
    out.mkdir(parents=True, exist_ok=True)
    file = (out / '.lock').open('a')
  except OSError as e:
    raise ConfigError(
      f'--out={str(out)!r}: {e.strerror}; give a folder that can be written'
    ) from None
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f'--out={str(out)!r}: another process writes there; wait for its end, '
        'or give another folder'
      ) from None
    except OSError as e:
      if e.errno not in NO_LOCKS:
        raise
    yield
