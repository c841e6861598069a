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


def test_augmentation_shifts_by_up_to_a_pixel():
  config = DataConfig(name='digits', augment=True)
  plain = _train_epoch(DataConfig(name='digits'))
  moved = _train_epoch(config)
  np.testing.assert_array_equal(moved['label'], plain['label'])
  seen = set()
  background = plain['image'].min()
  for image, shifted in zip(plain['image'], moved['image'], strict=True):
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=background)
    seen.add(
      next(
        (top, left)
        for top in range(3)
        for left in range(3)
        if np.allclose(padded[top : top + 8, left : left + 8], shifted)
      )
    )
  assert len(seen) == 9
  valid, again = (
    next(iter(data.load(c, batch_size=8).valid))
    for c in (config, DataConfig(name='digits'))
  )
  np.testing.assert_array_equal(valid['image'], again['image'])
