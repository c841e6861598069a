"""scikit-learn's 1797 handwritten digits, 8 x 8 pixels, ten classes.

One image in six validates, chosen by its number. Batches are
`dict(image [B, 8, 8, 1] float32, label [B] int32, weight [B] float32)`.
"""

import hashlib

import grain
import numpy as np
from scipy import ndimage

from efficient_attn.config import DataConfig
from efficient_attn.data import batches

VALID_EVERY = 6
MEAN, STD = 0.3053, 0.3760  # of all pixels in [0, 1]


def split(*, valid: bool) -> tuple[np.ndarray, np.ndarray]:
  """Returns the images [N, 8, 8], from 0 to 16, and labels [N] of one split."""
  from sklearn import datasets  # takes a second that text need not wait for

  data = datasets.load_digits()
  chosen = batches.held_out(len(data.target), VALID_EVERY) == valid
  return data.images[chosen], data.target[chosen].astype(np.int32)


class _Digits:
  """Random access to the digits of one split."""

  def __init__(self, valid: bool):
    images, self.labels = split(valid=valid)
    images = (images[..., None] / 16 - MEAN) / STD
    self.images = images.astype(np.float32)

  def __len__(self):
    return len(self.labels)

  def __getitem__(self, index):
    return dict(
      image=self.images[index],
      label=self.labels[index],
      weight=np.float32(1),
    )


def _warp(example, rng: np.random.Generator):
  """Turns, zooms and moves the image a little, with linear interpolation."""
  angle = rng.uniform(-0.15, 0.15)
  zoom = rng.uniform(0.9, 1.1)
  cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
  matrix = np.array([[cos, -sin], [sin, cos]])
  centre = np.array([3.5, 3.5])
  offset = centre - matrix @ (centre + rng.uniform(-0.6, 0.6, size=2))
  image = ndimage.affine_transform(
    example['image'][..., 0], matrix, offset, order=1, cval=-MEAN / STD
  )
  return example | {'image': image[..., None]}


def load(
  config: DataConfig, *, batch_size: int, seed: int, rows: range
) -> batches.Data:
  """Returns both splits; see `efficient_attn.data.load`."""
  source = _Digits(valid=False)
  train = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
  if config.augment:
    train = train.random_map(_warp)
  valid = grain.MapDataset.source(_Digits(valid=True))
  return batches.Data(
    train=batches.endless(train, batch_size, rows, config.workers),
    valid=batches.finite(valid.to_iter_dataset(batches.READ), batch_size, rows),
    example=source[0],
    valid_example=source[0],
    num_classes=10,
    fingerprint=hashlib.sha256(source.images.tobytes()).hexdigest(),
  )
