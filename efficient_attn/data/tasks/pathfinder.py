"""Pathfinder (1805.08315): does a dashed line join the two dots?"""

import dataclasses

import numpy as np

from efficient_attn.data.tasks.example import Example, Task, answers, check

DASH, GAP = 3, 2  # steps of a line that are drawn, and that are not
TURN = 0.35  # standard deviation of the change of direction in a step
DOT = 3  # brightness of the two dots; lines have 2, the ground 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pathfinder(Task):
  """An image as a sequence of pixels: two dots, and whether a path joins them.

  Two long dashed lines that do not touch each have a dot at one end; the other
  dot is at the second end of the first line, or of the second. Short dashed
  lines distract.

  Attributes:
    size: of the square image; the sequence has size^2 tokens.
    distractors: number of short lines.
  """

  size: int = 32
  distractors: int = 6
  num_tokens = DOT + 1
  most_answers = 1

  def __post_init__(self):
    check(self, self.size >= 12, 'size must be at least 12')

  def draw(self, rng: np.random.Generator, train: bool) -> Example:
    """Returns one example, whose only answer (0 or 1) is at its end."""
    del train
    lines = None
    while lines is None:
      taken = np.zeros((self.size, self.size), bool)
      lines = self._lines(rng, taken)
    image = np.zeros((self.size, self.size), np.int32)
    for line in lines:
      drawn = np.arange(len(line)) % (DASH + GAP) < DASH
      image[tuple(line[drawn].T)] = 2
    joined = int(rng.integers(2))
    ends = lines[0][0], lines[0 if joined else 1][-1]
    for row, column in ends:
      image[row, column] = DOT
    return answers(image.reshape(-1), joined, -1)

  def _lines(self, rng, taken):
    """Two long lines and the distractors, or None if there is no room."""
    long = self.size * 5 // 8
    lines = []
    for length in [long, long] + [long // 3] * self.distractors:
      for _ in range(50):
        line = self._line(rng, length, taken)
        if line is not None:
          break
      else:
        return None
      lines.append(line)
      for row, column in line:  # nothing comes closer than one pixel
        taken[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
    return lines

  def _line(self, rng, length, taken):
    """Pixels [L, 2] of one smooth line on free ground, or None."""
    place = rng.uniform(1, self.size - 1, 2)
    turns = rng.normal(0, TURN, length)
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(turns)
    steps = np.stack([np.sin(angles), np.cos(angles)], 1)
    pixels = np.floor(place + np.cumsum(steps, 0)).astype(int)
    pixels = pixels[np.r_[True, (np.diff(pixels, axis=0) != 0).any(1)]]
    inside = ((pixels >= 0) & (pixels < self.size)).all()
    if not inside or taken[tuple(pixels.T)].any():
      return None
    if len(np.unique(pixels, axis=0)) < len(pixels):
      return None  # it crosses itself
    return pixels
