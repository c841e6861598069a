"""Bytes of a text and its class, as in Long Range Arena (2011.04006)."""

import collections
import dataclasses
import functools
import glob
import os
import sysconfig
from collections.abc import Mapping

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data import documents, files
from efficient_attn.data.tasks.example import Example, Task, answers, check

CLASSES = ('neg', 'pos')
# Of many files each, in every version of Python; one file in five validates.
PACKAGES = ('asyncio', 'email', 'multiprocessing', 'unittest', 'xml')
VALID_EVERY = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteClassification(Task):
  """A text, byte by byte; of which class is it?

  Without a path the text is a window of Python's standard library, and its
  class one of five packages, all equally likely. Training and validation see
  different files. Other versions of Python have slightly other text.

  Attributes:
    path: '', or a folder with `train` and `test` (which validates), in each
      `neg` and `pos`, and in these a `.txt` file per document: the layout of
      the IMDB reviews.
    seq_len: number of bytes, 4000 in Long Range Arena. Of a longer document the
      first ones are taken; a shorter one has zeros in front.
  """

  path: str = ''
  seq_len: int = 1024
  num_tokens = 256
  most_answers = 1

  def __post_init__(self):
    check(self, self.seq_len > 0, 'seq_len must be > 0')
    if not self.path:
      sizes = [
        len(self._texts[package, train])
        for package in PACKAGES
        for train in (True, False)
      ]
      check(
        self,
        min(sizes) >= self.seq_len,
        f'a class has {min(sizes)} bytes in this Python; seq_len: at most so '
        'many, or give a path',
      )

  @functools.cached_property
  def _texts(self) -> Mapping[tuple[str, bool], bytes]:
    """What (package, train) is drawn from."""
    root = sysconfig.get_paths()['stdlib']
    texts = collections.defaultdict(bytes)
    for path in documents.standard_library():
      name = os.path.relpath(path, root)
      package = name.partition(os.sep)[0]
      if package in PACKAGES:
        train = not documents.validates(name, VALID_EVERY)
        with open(path, 'rb') as file:
          texts[package, train] += file.read()
    return texts

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one window, whose only answer (0 to 4) is at its end."""
    label = int(rng.integers(len(PACKAGES)))
    text = self._texts[PACKAGES[label], train]
    start = rng.integers(len(text) - self.seq_len + 1)
    return self._example(text[start : start + self.seq_len], label)

  def stored(self, train: bool) -> list[tuple[str, int]] | None:
    """Returns the file and the class of every document."""
    if not self.path:
      return None
    items = []
    for label, name in enumerate(CLASSES):
      pattern = os.path.join('train' if train else 'test', name, '*.txt')
      paths = sorted(glob.glob(pattern, root_dir=self.path))
      if not paths:
        raise ConfigError(
          f'data.options.path={self.path!r} has no {pattern}; give a folder '
          "with train/ and test/, in both neg/ and pos/ (IMDB's is aclImdb)"
        )
      items += [(os.path.join(self.path, path), label) for path in paths]
    return items

  def content(self, train: bool) -> list[bytes]:
    """Returns a hash of the files, or Python's own text."""
    if not self.path:
      return [self._texts[package, train] for package in PACKAGES]
    paths = [path for path, _ in self.stored(train)]
    return [files.fingerprint(paths).encode()]

  def example_of(self, item: tuple[str, int]) -> Example:
    """Returns one document, whose only answer (0 or 1) is at its end."""
    path, label = item
    try:
      with open(path, 'rb') as file:
        text = file.read(self.seq_len)
    except OSError as error:
      raise files.unreadable(path, error) from error
    return self._example(text.rjust(self.seq_len, b'\0'), label)

  def _example(self, text, label):
    return answers(np.frombuffer(text, np.uint8), label, -1)
