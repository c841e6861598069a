"""Classifier of sequences, on an encoder or a decoder.

  logits = W pool(hidden(tokens)) + b

over all real tokens (`mean`), or the first or the last of them. Embeddings,
blocks and norm have the names of those of a language model and of an encoder,
so that a trained one can be the start.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ClassifierConfig
from efficient_attn.layers.context import Context
from efficient_attn.layers.embed import Embed
from efficient_attn.layers.param import Projection
from efficient_attn.models.trunk import Trunk


class Classifier(Trunk):
  """Maps token ids to the logits of the classes of their sequence."""

  def __init__(self, config: ClassifierConfig, *, rngs: nnx.Rngs):
    scale = config.embedding.scale
    self.embed = Embed(
      config.vocab_size, config.d_model, scale=scale, rngs=rngs
    )
    super().__init__(
      config,
      causal=config.causal,
      embed_norm=config.norm_position == 'post' and not config.causal,
      rngs=rngs,
    )
    self.head = Projection(
      {'embed': config.d_model},
      {'classes': config.num_classes},
      bias=True,
      init=lambda key, shape, fan_in: jnp.zeros(shape),
      rngs=rngs,
    )
    self.pooling = config.pooling

  def __call__(self, tokens, *, positions=None, segment_ids=None, key=None):
    """Runs the model.

    Args:
      tokens: int32 [B, T].
      positions: int32 [T] or [B, T]; default: counted from the first token.
      segment_ids: int32 [B, T], 0 for padding; None: there is none.
      key: PRNG key for dropout; None to not drop.

    Returns:
      float32 logits [B, classes].
    """
    context = Context(positions=positions, segment_ids=segment_ids)
    x, _ = self.run(self.embed(tokens, self.dtype), context, key=key)
    real = jnp.ones_like(tokens) if segment_ids is None else segment_ids != 0
    x = pool(x.astype(jnp.float32), real, self.pooling)
    return self.head(x.astype(self.dtype)).astype(jnp.float32)


def pool(x: jax.Array, real: jax.Array, pooling: str) -> jax.Array:
  """Returns the mean of the chosen tokens of x [B, T, D], as [B, D].

  Args:
    x: zeros are returned for rows without a real token.
    real: bool [B, T].
    pooling: 'mean', 'first' or 'last' of the real tokens.
  """
  real = real.astype(bool)
  number = jnp.cumsum(real, axis=1)
  if pooling == 'first':
    real = real & (number == 1)
  elif pooling == 'last':
    real = real & (number == number[:, -1:])
  total = jnp.sum(jnp.where(real[..., None], x, 0), axis=1)
  return total / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None]
