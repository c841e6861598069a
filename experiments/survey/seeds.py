"""Figures that depend on a seed: the seeds, and how they are shown."""

from collections.abc import Sequence
from statistics import fmean

SEEDS = (0, 1, 2, 3, 4)


def spread(found: Sequence[float]) -> str:
  """The mean over seeds, with the least and the largest."""
  return f'{fmean(found):.3g} ({min(found):.3g} to {max(found):.3g})'
