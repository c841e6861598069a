"""An encoder's mixer made of a causal one: one pass in each direction.

y = mixer(x) + reverse(mixer(reverse(x))), with the same weights, as Vision
Mamba (2401.09417) does with two sets of weights. For recurrences whose layer
has causal parts besides the op (convolutions, token shifts, stabilisers).
"""

import jax
import jax.numpy as jnp

from efficient_attn.layers.mixer import Mixer, refuse_cache


class BothWays(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; every token sees its segment."""

  def __init__(self, mixer: Mixer):
    self.mixer = mixer

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; there is no cache, because there is no next token."""
    if cache is not None:
      refuse_cache(type(self.mixer).__name__)
    forward, _ = self.mixer(x, context)
    reverse = context.replace(
      positions=jax.tree.map(lambda p: jnp.flip(p, -1), context.positions),
      segment_ids=jax.tree.map(lambda s: jnp.flip(s, 1), context.segment_ids),
    )
    backward, _ = self.mixer(jnp.flip(x, 1), reverse)
    return forward + jnp.flip(backward, 1), None

  def init_cache(self, batch: int, max_len: int, dtype):
    """Refuses: an encoder has no cache."""
    refuse_cache(type(self.mixer).__name__)
