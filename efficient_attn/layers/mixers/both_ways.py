"""An encoder's mixer made of a causal one: one pass in each direction.

y = mixer(x) + reverse(mixer(reverse(x))), with the same weights, as Vision
Mamba (2401.09417) does with two sets of weights. For recurrences whose layer
has causal parts besides the op (convolutions, token shifts, stabilisers).
"""

import jax.numpy as jnp
from flax import nnx


class BothWays(nnx.Module):
  """Token mixer [B, T, D] -> [B, T, D]; every token sees its segment."""

  def __init__(self, mixer: nnx.Module):
    self.mixer = mixer

  def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
    """Mixes tokens; there is no cache, because there is no next token."""
    if cache is not None:
      raise NotImplementedError('an encoder has no cache; use causal=True')
    forward, _ = self.mixer(x, positions=positions, segment_ids=segment_ids)
    if segment_ids is not None:
      segment_ids = jnp.flip(segment_ids, -1)
    if positions is not None:
      positions = jnp.flip(positions, -1)
    backward, _ = self.mixer(
      jnp.flip(x, 1), positions=positions, segment_ids=segment_ids
    )
    return forward + jnp.flip(backward, 1), None

  def init_cache(self, batch: int, max_len: int, dtype):
    """Refuses: an encoder has no cache."""
    raise NotImplementedError('an encoder has no cache; use causal=True')
