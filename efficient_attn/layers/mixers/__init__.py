"""Every token mixer, one row each.

The contract of a mixer:

  mixer(x, *, positions=None, segment_ids=None, cache=None) -> (y, cache)
  mixer.init_cache(batch, max_len, dtype) -> cache

x and y are [B, T, D]; positions [T] or [B, T] int32 (default: counted from the
start, or from what the cache has seen); segment_ids [B, T] int32 keep packed
sequences apart. Without a cache the call sees whole sequences; with one the
same call continues where the cache ends, by one token or by many.

Adding a method is one file here and one row in `MIXERS`.
"""

import dataclasses
import inspect
from collections.abc import Callable

from flax import nnx

from efficient_attn.config import ConfigError, choose, nearest
from efficient_attn.layers.mixers.attention import Attention
from efficient_attn.layers.mixers.gla import GLA
from efficient_attn.layers.mixers.linear import Linear
from efficient_attn.layers.mixers.retention import Retention
from efficient_attn.layers.mixers.window import Window


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerSpec:
  """One row of the method table; every field is shown, tested or both.

  Attributes:
    build: the module class.
    family: hardware-efficient | compact | sparse | low-rank | linear |
      test-time.
    title: the method's name in its paper.
    year: of the paper.
    reference: arXiv number or venue.
    gate: none | constant | scalar | channel: what decays the past.
    bidirectional: whether it can also be an encoder's mixer.
    time: exponent of T in the cost of a training pass.
    state: exponent of T in the size of the decode state.
    forms: the executions that exist and agree.
  """

  build: Callable[..., nnx.Module]
  family: str
  title: str
  year: int
  reference: str
  gate: str
  bidirectional: bool
  time: float
  state: float
  forms: tuple[str, ...]


LINEAR_FORMS = ('recurrent', 'parallel', 'chunkwise')

MIXERS = {
  'attention': MixerSpec(
    build=Attention,
    family='hardware-efficient',
    title='Softmax attention (MHA, GQA, MQA)',
    year=2017,
    reference='1706.03762',
    gate='none',
    bidirectional=True,
    time=2,
    state=1,
    forms=('reference', 'blockwise'),
  ),
  'window': MixerSpec(
    build=Window,
    family='sparse',
    title='Sliding-window attention',
    year=2020,
    reference='2004.05150',
    gate='none',
    bidirectional=True,
    time=1,
    state=0,
    forms=('reference', 'blockwise'),
  ),
  'linear': MixerSpec(
    build=Linear,
    family='linear',
    title='Linear Transformer',
    year=2020,
    reference='2006.16236',
    gate='none',
    bidirectional=True,
    time=1,
    state=0,
    forms=LINEAR_FORMS,
  ),
  'retention': MixerSpec(
    build=Retention,
    family='linear',
    title='RetNet',
    year=2023,
    reference='2307.08621',
    gate='constant',
    bidirectional=True,
    time=1,
    state=0,
    forms=LINEAR_FORMS,
  ),
  'gla': MixerSpec(
    build=GLA,
    family='linear',
    title='Gated Linear Attention',
    year=2023,
    reference='2312.06635',
    gate='channel',
    bidirectional=True,
    time=1,
    state=0,
    forms=LINEAR_FORMS,
  ),
}


def build_mixer(
  name: str,
  *,
  d_model: int,
  num_heads: int,
  rngs: nnx.Rngs,
  causal: bool = True,
  **options,
) -> nnx.Module:
  """Builds the mixer of row `name` with its own `options`.

  Raises:
    ConfigError: an unknown name or option, or a value the mixer refuses.
    NotImplementedError: causal=False for a mixer that is causal only.
  """
  spec = choose('model.pattern', name, MIXERS)
  if not causal and not spec.bidirectional:
    able = [n for n, s in MIXERS.items() if s.bidirectional]
    raise NotImplementedError(
      f'{name} is causal only; for an encoder use one of {", ".join(able)}'
    )
  valid = mixer_options(name)
  for option, value in options.items():
    if option not in valid:
      raise ConfigError(
        f'model.mixers.{name}.{option}={value!r} is not an option of {name}; '
        f'{nearest(option, valid)}'
      )
  return spec.build(
    d_model=d_model, num_heads=num_heads, causal=causal, rngs=rngs, **options
  )


def mixer_options(name: str) -> dict[str, inspect.Parameter]:
  """Returns the options of a mixer, with their defaults, by name."""
  common = ('self', 'd_model', 'num_heads', 'causal', 'rngs', 'options')
  found = {}
  for cls in reversed(MIXERS[name].build.__mro__):
    if '__init__' in vars(cls) and issubclass(cls, nnx.Module):
      found |= inspect.signature(cls.__init__).parameters
  return {k: v for k, v in found.items() if k not in common}
