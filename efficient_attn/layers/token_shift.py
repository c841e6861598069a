"""Token shift of the RWKV family: every token sees the one before it.

RWKV (Peng et al. 2305.13048) mixes x_{t-1} into the inputs of each
projection; the recurrent state of the shift is the last token.
"""

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.layers.recurrence import Recurrent
from efficient_attn.ops import chunks


class Shifted(Recurrent):
  """A recurrence whose tokens, `d_model` wide, see the one before them."""

  def shifted(self, x: jax.Array, context, past):
    """Returns the token before each of x, and the tails."""
    return token_shift(x, segment_ids=context.segment_ids, state=past.tails)

  def init_tails(self, batch, dtype):
    """Returns zeros."""
    return jnp.zeros((batch, self.d_model), dtype)


def token_shift(
  x: jax.Array,
  *,
  segment_ids: jax.Array | None = None,
  state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the previous token of each token, and the last token.

  Args:
    x: [B, T, D].
    segment_ids: [B, T]; the first token of a segment sees zeros.
    state: [B, D], the token before token 0; zeros by default.

  Returns:
    previous: [B, T, D].
    state: [B, D], the last token: `state` of the next call.
  """
  if state is None:
    state = jnp.zeros_like(x[:, 0])
  state = sharding.constrain(state.astype(x.dtype), 'batch', None)
  previous = jnp.concatenate([state[:, None], x[:, :-1]], axis=1)
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)
    previous = jnp.where(starts[..., None], 0, previous)
  return previous, x[:, -1]
