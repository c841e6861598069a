import numpy as np
from sklearn.datasets import load_digits

from efficient_attn import data
from efficient_attn.config import DataConfig


def _train_epoch(config):
  return next(iter(data.load(config, batch_size=1500, seed=0).train))


def test_split_is_fixed_and_disjoint():
  config = DataConfig(name='digits')
  valid = list(data.load(config, batch_size=64).valid)
  real = np.concatenate([batch['weight'] for batch in valid])
  images = np.concatenate([batch['image'] for batch in valid])[real > 0]
  assert len(images) == 297 and real.sum() == 297
  assert len(real) == 5 * 64 and not real[297:].any()
  train = _train_epoch(config)['image']
  both = {image.tobytes() for image in (*train, *images)}
  assert len(both) == len({i.tobytes() for i in load_digits().images}) == 1797


def test_images_are_normalised():
  batch = _train_epoch(DataConfig(name='digits'))
  assert abs(batch['image'].mean()) < 0.02
  assert abs(batch['image'].std() - 1) < 0.02
  assert set(batch['label']) == set(range(10))


def test_augmentation_moves_a_little():
  config = DataConfig(name='digits', augment=True)
  plain = _train_epoch(DataConfig(name='digits'))
  moved = _train_epoch(config)
  np.testing.assert_array_equal(moved['label'], plain['label'])
  assert moved['image'].dtype == np.float32
  change = np.abs(moved['image'] - plain['image']).mean(axis=(1, 2, 3))
  other = np.abs(moved['image'][1:] - plain['image'][:-1]).mean(axis=(1, 2, 3))
  assert (change > 0).all() and (change[1:] < other).mean() > 0.9
  valid, again = (
    next(iter(data.load(c, batch_size=8).valid))
    for c in (config, DataConfig(name='digits'))
  )
  np.testing.assert_array_equal(valid['image'], again['image'])
