"""What one row of the method table says."""

import dataclasses
from collections.abc import Callable

from flax import nnx

# The executions of the ops with a matrix state; 'parallel' is 'chunkwise' with
# one chunk.
LINEAR_FORMS = ('recurrent', 'parallel', 'chunkwise')

TWO_PASSES = 'two passes'


@dataclasses.dataclass(frozen=True)
class MixerSpec:
  """One row of the method table; every field is shown, tested or both.

  Attributes:
    build: the module class, or what composes one.
    title: the method's name in its paper.
    year: of the paper.
    reference: arXiv number or venue.
    gate: none | constant | scalar | channel: what decays the past.
    forms: the executions that exist and agree.
    causal: whether it can be a decoder's mixer.
    bidirectional: whether it can also be an encoder's mixer: by itself
      (True), by one pass in each direction (TWO_PASSES), or not (False).
    packing: whether it keeps the segments of a packed row apart.
    time: exponent of T in the cost of a training pass, counted from 16K to 64K
      tokens: of a sum of terms it is one in between.
    state: exponent of T in the size of the decode state, or 'log'.
  """

  build: Callable[..., nnx.Module]
  title: str
  year: int
  reference: str
  _: dataclasses.KW_ONLY
  gate: str = 'none'
  forms: tuple[str, ...] = LINEAR_FORMS
  causal: bool = True
  bidirectional: bool | str = True
  packing: bool = True
  time: float = 1
  state: float | str = 0
