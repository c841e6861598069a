"""What the tables of the surveys need and no claim stores: counts on shapes."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.decode.eviction import Evicting
from efficient_attn.layers.mixers import MIXERS, mixer_options
from efficient_attn.models import cost
from efficient_attn.ops.selection import SELECTORS
from experiments.exponent import slope
from experiments.survey.claims.complexity import HEADS, LENGTHS, D, build
from experiments.survey.models import cache_bytes, mixer, parameters

NOT_MEASURED = 'not measured'
SHORT = (2048, 8192)  # lengths of forms that a training run would not choose
TOKENS, BUDGET = 2**16, 1024


@functools.cache
def in_form(name: str, form: str) -> tuple[float, float]:
  """Exponents of time and memory of training as one chunk or token by token."""
  counts = []
  for length in SHORT:
    size = length if form == 'quadratic' else 1
    module = mixer(name, D, HEADS, causal=True, chunk_size=size)
    graphdef, params = nnx.split(module)

    def loss(params, x, graphdef=graphdef):
      return jnp.sum(nnx.merge(graphdef, params)(x)[0])

    x = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
    counts.append(cost.count(jax.grad(loss, (0, 1)), params, x))
  return (
    slope(SHORT, [c.operations for c in counts]),
    slope(SHORT, [c.largest_array for c in counts]),
  )


@functools.cache
def decoding(name: str) -> float:
  """The exponent of decoding N tokens: operations of one, after others."""
  module = build(name, True)
  graphdef, params = nnx.split(module)
  x, counts = jax.ShapeDtypeStruct((1, 1, D), jnp.float32), []

  def step(params, x, cache):
    return nnx.merge(graphdef, params)(x, cache=cache)[0]

  for length in LENGTHS:
    cache = jax.eval_shape(
      lambda params, length=length: nnx.merge(graphdef, params).init_cache(
        1, length, jnp.float32
      ),
      params,
    )
    counts.append(cost.count(step, params, x, cache).operations)
  return 1 + slope(LENGTHS, counts)


@functools.cache
def layer(name: str, causal: bool) -> nnx.Module:
  """A row with one kv head, where it can have that."""
  options = {'num_kv_heads': 1} if 'num_kv_heads' in mixer_options(name) else {}
  return mixer(name, 512, 4, causal=causal, **options)


def stored(ours: str) -> float | str:
  """Bytes of the decode state over those of attention, or why there are none.

  A selector returns a mask over all keys; CHAI's heads can drop some.
  """
  what, _, name = ours.rpartition(' ')
  attention = layer('attention', True)
  if what == 'selector':
    selector = SELECTORS[name]
    if selector.sees == 'grid':
      return 'no cache'
    return 'all keys' if selector.returns != 'heads' else NOT_MEASURED
  if what == 'policy':
    module = Evicting(attention, name, BUDGET)
  elif MIXERS[name].causal:
    module = layer(name, True)
  else:
    return 'no cache'
  return cache_bytes(module, TOKENS) / cache_bytes(attention, TOKENS)


def uses(ours: str) -> tuple[bool, bool, int]:
  """Whether it decodes text, whether it sees both ways, its parameters."""
  what, _, name = ours.rpartition(' ')
  if what == 'policy':
    return True, False, 0
  if what == 'selector':
    grid = SELECTORS[name].sees == 'grid'
    return not grid, grid, 0
  spec = MIXERS[name]
  own = parameters(layer(name, spec.causal))
  own -= parameters(layer('attention', spec.causal))
  return spec.causal, bool(spec.bidirectional), own
