"""An image, pixel by pixel, as in Long Range Arena (2011.04006)."""

import dataclasses
import os
from typing import Any

import numpy as np

from efficient_attn.config import ConfigError
from efficient_attn.data import digits, files
from efficient_attn.data.tasks.example import Example, Task, answers

TRAIN = tuple(f'data_batch_{i}.bin' for i in range(1, 6))
VALID = ('test_batch.bin',)
PIXELS = 32 * 32
RECORD = 1 + 3 * PIXELS  # the label, then all red, all green and all blue
LUMA = np.array([2989, 5870, 1140], np.uint32)  # of 10000


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSequence(Task):
  """Brightness 0 to 255 row by row; what does the image show?

  Attributes:
    path: '' for scikit-learn's digits, 64 pixels, split as by
      `data.name='digits'`; or the folder of the binary version of CIFAR-10,
      1024 pixels, made grey. Its test batch validates.
  """

  path: str = ''
  num_tokens = 256
  most_answers = 1

  def stored(self, train: bool) -> list[tuple[np.ndarray, Any]]:
    """Returns the pixels and the class of every image, in the files' order."""
    images, labels = _cifar(self.path, train) if self.path else _digits(train)
    return list(zip(images, labels, strict=True))

  def content(self, train: bool) -> list[bytes]:
    """Returns the pixels of every image."""
    return [pixels.tobytes() for pixels, _ in self.stored(train)]

  def example_of(self, item: tuple[np.ndarray, Any]) -> Example:
    """Returns one example, whose only answer (0 to 9) is at its end."""
    pixels, label = item
    return answers(pixels, label, -1)


def _digits(train):
  images, labels = digits.split(valid=not train)
  pixels = np.rint(images.reshape(len(images), -1) * 255 / 16)
  return pixels.astype(np.uint8), labels


def _cifar(path, train):
  """Returns the pixels [N, 1024] and labels [N] of one split."""
  names = TRAIN if train else VALID
  images, labels = zip(*(_batch(path, name) for name in names), strict=True)
  return np.concatenate(images), np.concatenate(labels)


def _batch(path, name):
  file = os.path.join(path, name)
  if not os.path.isfile(file):
    raise ConfigError(
      f'data.options.path={path!r} has no file {name!r}; give the folder '
      "cifar-10-batches-bin of CIFAR-10's binary version (its Python version "
      'is not read: pickles of others can run their code)'
    )
  try:
    data = np.fromfile(file, np.uint8)
  except OSError as error:
    raise files.unreadable(file, error) from error
  whole = len(data) and len(data) % RECORD == 0
  if not whole or (data[::RECORD] > 9).any():
    raise ConfigError(
      f'data.options.path={path!r}: {name!r} is not of CIFAR-10, whose images '
      f'have {RECORD} bytes, the first of them a class up to 9'
    )
  records = data.reshape(-1, RECORD)
  colours = records[:, 1:].reshape(-1, 3, PIXELS)
  grey = (np.einsum('ncp,c->np', colours, LUMA) + 5000) // 10_000
  return grey.astype(np.uint8), records[:, 0]
