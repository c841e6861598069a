"""Bijections between a tensor of a file and parameters of ours, in one line.

'(n h) d -> d n h' is torch's [out, in] matrix of n heads of h channels and our
[D, N, H]. A tensor may hold several of ours, parted along one axis in brackets:

  '([n] h) d -> d n h'                  blocks of query, key and value heads
  '(n [x] h) d -> d n h'                the three of each head side by side
  '(k [g] h) d -> d (k g) h, d k h, d k h'   those of each group of queries
  '[n h] d -> d n h, d n h, d n'        blocks whose heads differ in width
  '(n i 2) d -> d n (2 i)'              neighbours in pairs, ours are halves

Sizes follow from the shapes of ours; an axis that ours lack is 1, a number is
itself. Those in brackets are sizes of each parameter, the others of all.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """A parsed bijection.

  Attributes:
    theirs: the axes of the tensor, each a group of elementary ones.
    ours: the same for each parameter.
    parted: the elementary axes along which they follow each other, taken as
      one; () for none.
  """

  theirs: tuple[tuple[str, ...], ...]
  ours: tuple[tuple[tuple[str, ...], ...], ...]
  parted: tuple[str, ...]

  def sizes(self, shapes: Sequence[Shape]) -> list[dict[str, int]]:
    """Returns the sizes of elementary axes for each parameter."""
    shared, own = {}, [{} for _ in shapes]

    def known(i, axis):
      if axis.isdigit():
        return int(axis)
      return (own[i] if axis in self.parted else shared).get(axis)

    pending = [
      (i, group, size)
      for i, shape in enumerate(shapes)
      for group, size in zip(self.ours[i], shape, strict=True)
    ]
    while pending:
      left = []
      for i, group, size in pending:
        unknown = [axis for axis in group if known(i, axis) is None]
        rest = math.prod(known(i, a) for a in group if a not in unknown)
        if len(unknown) > 1:
          left.append((i, group, size))
        elif size % rest or not unknown and size != rest:
          raise ValueError(f'{shapes} are no parts of {self.theirs}')
        elif unknown:
          of = own[i] if unknown[0] in self.parted else shared
          of[unknown[0]] = size // rest
      if len(left) == len(pending):
        raise ValueError(f'{self.theirs}: the sizes of {left} are open')
      pending = left
    axes = [axis for group in self.theirs for axis in group]
    return [
      {axis: known(i, axis) or 1 for axis in axes} for i in range(len(shapes))
    ]

  def shape(self, shapes: Sequence[Shape]) -> Shape:
    """Returns the shape of the tensor that holds parameters of `shapes`."""
    sizes = self.sizes(shapes)
    total = dict(sizes[0])
    if self.parted:
      total |= dict.fromkeys(self.parted, 1)
      total[self.parted[0]] = sum(map(self._length, sizes))
    return tuple(math.prod(total[a] for a in group) for group in self.theirs)

  def _length(self, sizes):
    """Returns how much of the parted axes one parameter takes."""
    return math.prod(sizes[axis] for axis in self.parted)

  def read(
    self, tensor: np.ndarray, shapes: Sequence[Shape], part: int
  ) -> np.ndarray:
    """Returns one of the parameters, a view of the tensor where it can be."""
    sizes, axes = self.sizes(shapes), sum(self.theirs, ())
    own = [sizes[part][axis] for axis in axes]
    found = tensor.reshape(own) if not self.parted else None
    if self.parted:
      counts = list(map(self._length, sizes))
      begin, first = sum(counts[:part]), axes.index(self.parted[0])
      before, after = own[:first], own[first + len(self.parted) :]
      found = tensor.reshape([*before, sum(counts), *after])
      places = [slice(None)] * first + [slice(begin, begin + counts[part])]
      found = found[tuple(places)].reshape(own)
    wanted = sum(self.ours[part], ())
    lacking = tuple(i for i, axis in enumerate(axes) if axis not in wanted)
    found = found.squeeze(lacking)
    kept = [axis for axis in axes if axis in wanted]
    return found.transpose([kept.index(a) for a in wanted]).reshape(
      shapes[part]
    )

  def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the tensor that holds all the parameters."""
    axes, found = sum(self.theirs, ()), []
    sizes = self.sizes([part.shape for part in parts])
    for part, ours, size in zip(parts, self.ours, sizes, strict=True):
      has = sum(ours, ())
      array = part.reshape([size[axis] for axis in has])
      array = array.transpose([has.index(a) for a in axes if a in has])
      found.append(array.reshape([size[axis] for axis in axes]))
    if self.parted:
      first = axes.index(self.parted[0])
      found = [
        x.reshape(*x.shape[:first], -1, *x.shape[first + len(self.parted) :])
        for x in found
      ]
      found = [np.concatenate(found, first)] if len(found) > 1 else found
    (joined,) = found
    return joined.reshape(self.shape([part.shape for part in parts]))


@functools.cache
def parse(text: str, parts: int = 1) -> Rule:
  """Parses a rule of `parts` parameters; one form of ours serves them all."""
  theirs, _, ours = text.partition('->')
  forms = [_groups(form) for form in ours.split(',')]
  forms = forms * parts if len(forms) == 1 else forms
  if len(forms) != parts:
    raise ValueError(f'{text!r} has {len(forms)} forms for {parts} parameters')
  (parted,) = re.findall(r'\[([\w ]+)\]', theirs) or ['']
  if '(' not in theirs.partition('[')[0].rpartition(')')[2]:
    # Brackets that stand in no group are one.
    theirs = theirs.replace('[', '(').replace(']', ')')
  theirs = _groups(theirs.replace('[', '').replace(']', ''))
  return Rule(theirs, tuple(forms), tuple(parted.split()))


def _groups(text):
  """Splits '(n h) d' into (('n', 'h'), ('d',))."""
  found = re.findall(r'\(([^)]*)\)|(\w+)', text)
  return tuple(tuple((group or axis).split()) for group, axis in found)
