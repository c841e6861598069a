"""Images pixel by pixel: those of the files, each once, in the right split."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from tests.data.answered import golden, rows

TRAIN = [f'data_batch_{i}.bin' for i in range(1, 6)]


def images(valid_examples=10_000, train_examples=0, **options):
  return DataConfig(
    name='image_sequence',
    options=options,
    valid_examples=valid_examples,
    train_examples=train_examples,
  )


@pytest.fixture
def cifar(tmp_path):
  """A folder with four random images a file."""
  rng = np.random.default_rng(0)
  for name in (*TRAIN, 'test_batch.bin'):
    records = rng.integers(256, size=(4, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    records.tofile(tmp_path / name)
  return tmp_path


def pairs(pixels, labels):
  flat = pixels.reshape(len(pixels), -1).tolist()
  return sorted(zip(map(bytes, flat), labels.tolist(), strict=True))


def test_examples_do_not_change(cifar):
  assert golden(images()) == '20daea978c90e97b'
  assert golden(images(path=str(cifar))) == '23f6f8273e07a741'


def test_digits_are_split_like_the_dataset_of_that_name():
  train, valid = rows(images(), batches=150)
  grey = np.array([list(pixels) for pixels, _ in train + valid])
  labels = np.array([label for _, label in train + valid])
  assert grey.min() == 0 and grey.max() == 255
  grey = np.rint(grey * (16 / 255)).astype(int)
  stored = load_digits()
  assert pairs(grey, labels) == pairs(stored.images.astype(int), stored.target)
  (batch,) = data.load(DataConfig(name='digits'), batch_size=297).valid
  same = np.rint((batch['image'] * 0.3760 + 0.3053) * 16).astype(int)
  assert pairs(grey[1500:], labels[1500:]) == pairs(same, batch['label'])


def test_cifar_is_grey_row_by_row(cifar):
  found = rows(images(path=str(cifar)))
  for split, names in zip(found, (TRAIN, ['test_batch.bin']), strict=True):
    records = b''.join((cifar / name).read_bytes() for name in names)
    records = np.frombuffer(records, np.uint8).reshape(-1, 3073)
    red, green, blue = records[:, 1:].reshape(-1, 3, 32, 32).swapaxes(0, 1)
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    wanted = pairs(np.floor(grey + 0.5 + 1e-9).astype(int), records[:, 0])
    assert sorted(split) == wanted and len(wanted) == 4 * len(names)


def test_fewer_examples_are_the_same_ones():
  some, valid = rows(images(15, train_examples=20), batches=4)
  assert len(set(some)) == 20 and sorted(some[:20]) == sorted(some[20:])
  assert some[:20] != some[20:]
  assert valid == rows(images())[1][:15]


def test_mistakes(cifar, tmp_path_factory):
  def fails(path, match):
    with pytest.raises(ConfigError, match=match):
      data.load(images(path=str(path)), batch_size=2)

  fails('nowhere', "data.options.path='nowhere' has no file 'data_batch_1.bin'")
  pickles = tmp_path_factory.mktemp('cifar-10-batches-py')
  (pickles / 'data_batch_1').write_bytes(b'')
  fails(pickles, 'binary version .its Python version is not read')
  for content in (b'', b'\0' * 3074, b'\x0a' * 3073):
    (cifar / TRAIN[1]).write_bytes(content)
    fails(cifar, "'data_batch_2.bin' is not of CIFAR-10")
  (cifar / 'test_batch.bin').unlink()
  (cifar / TRAIN[1]).write_bytes(b'\0' * 3073)
  fails(cifar, "has no file 'test_batch.bin'")
