"""Mixers side by side, the layer of Falcon-H1 (2507.22448).

  y = sum_i out_i * mixer_i(in_i * x)

Mamba-2 and attention by default: a state of fixed size sums up the past, and
attention recalls its tokens. The factors in_i and out_i are constants.
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.mixer import Mixer
from efficient_attn.values import under

DEFAULT = {'mamba2': {}, 'attention': {}}


class Parallel(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `mixers` are options by name, as of a model. `input_scales` and
  `output_scales` are factors by name, 1 where they have none.
  """

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    mixers: Mapping[str, Mapping[str, Any]] = DEFAULT,
    input_scales: Mapping[str, float] = {},
    output_scales: Mapping[str, float] = {},
  ):
    # Not at the top: the table of mixers has this one.
    from efficient_attn.layers.mixers import build_mixer

    if not mixers:
      raise ConfigError('mixers={} must name at least one mixer')
    for key, scales in (
      ('input_scales', input_scales),
      ('output_scales', output_scales),
    ):
      for name in scales:
        choose(key, name, mixers)
    self.mixers, self.scales = nnx.Dict(), {}
    for name, options in sorted(mixers.items()):  # as a stored config may be
      if options.get('shared_kv'):
        raise ConfigError(
          f'mixers.{name}.shared_kv={options["shared_kv"]!r} is not possible '
          'side by side with others; use shared_kv=False'
        )
      with under('mixers'):
        self.mixers[name] = build_mixer(
          name.partition(':')[0],
          d_model=d_model,
          causal=causal,
          rngs=rngs,
          **{'num_heads': num_heads, **options},
        )
      self.scales[name] = (
        input_scales.get(name, 1.0),
        output_scales.get(name, 1.0),
      )
    self.causal = causal
    for ability in ('packing', 'left_padding'):
      able = all(getattr(mixer, ability) for mixer in self.mixers.values())
      setattr(self, ability, able)

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    total, after = 0, {}
    for name, mixer in self.mixers.items():
      enter, leave = self.scales[name]
      y, after[name] = mixer(x * enter, context, cache and cache[name])
      total = total + y * leave
    return total, None if cache is None else after

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the caches before the first token, one a mixer."""
    return {
      name: mixer.init_cache(batch, max_len, dtype)
      for name, mixer in self.mixers.items()
    }
