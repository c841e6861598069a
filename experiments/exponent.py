"""The exponent of what grows like a power."""

from collections.abc import Sequence

import numpy as np


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
  """Returns the exponent p of y ~ x^p: the least squares fit of the logs."""
  return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])
