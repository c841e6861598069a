"""How far a result is from what it should be."""

import numpy as np


def largest(found, wanted) -> float:
  """Returns the largest error over the largest value, in float64."""
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def relative(found, wanted) -> float:
  """Returns the norm of the error over that of what is wanted, in float64."""
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
