"""What the tables of the surveys need and no claim stores: counts on shapes."""

import functools

from efficient_attn.decode.eviction import Evicting
from efficient_attn.layers.mixers import MIXERS
from efficient_attn.ops.selection import SELECTORS
from experiments.exponent import slope
from experiments.survey.claims.complexity import (
  HEADS,
  LENGTHS,
  D,
  build,
  sequence,
)
from experiments.survey.models import (
  decode_step,
  mixer,
  parameters,
  training_pass,
)
from experiments.survey.sparse_counts import cache_share, with_one_kv_head

NOT_MEASURED = 'not measured'
SHORT = (2048, 8192)  # lengths of forms that a training run would not choose
BUDGET = 1024


@functools.cache
def in_form(name: str, form: str) -> tuple[float, float]:
  """Exponents of time and memory of training as one chunk or token by token."""
  counts = []
  for length in SHORT:
    size = length if form == 'quadratic' else 1
    module = mixer(name, D, HEADS, causal=True, chunk_size=size)
    counts.append(training_pass(module, sequence(length)))
  return (
    slope(SHORT, [c.operations for c in counts]),
    slope(SHORT, [c.largest_array for c in counts]),
  )


@functools.cache
def decoding(name: str) -> float:
  """The exponent of decoding N tokens: operations of one, after others."""
  module = build(name, LENGTHS[-1])
  counts = [decode_step(module, D, n).operations for n in LENGTHS]
  return 1 + slope(LENGTHS, counts)


def stored(ours: str) -> float | str:
  """Bytes of the decode state over those of attention, or why there are none.

  A selector returns a mask over all keys; CHAI's heads can drop some.
  """
  what, _, name = ours.rpartition(' ')
  if what == 'selector':
    selector = SELECTORS[name]
    if selector.sees == 'grid':
      return 'no cache'
    return 'all keys' if selector.returns != 'heads' else NOT_MEASURED
  if what == 'policy':
    module = Evicting(with_one_kv_head('attention'), name, BUDGET)
  elif MIXERS[name].causal:
    module = with_one_kv_head(name)
  else:
    return 'no cache'
  return cache_share(module)


def uses(ours: str) -> tuple[bool, bool, int]:
  """Whether it decodes text, whether it sees both ways, its parameters."""
  what, _, name = ours.rpartition(' ')
  if what == 'policy':
    return True, False, 0
  if what == 'selector':
    grid = SELECTORS[name].sees == 'grid'
    return not grid, grid, 0
  spec = MIXERS[name]
  own, plain = (
    parameters(with_one_kv_head(n, spec.causal)) for n in (name, 'attention')
  )
  return spec.causal, bool(spec.bidirectional), own - plain
