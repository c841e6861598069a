"""Encoder of tokens, trained to name those that are masked.

BERT (Devlin et al. 1810.04805) is the one with post-norms, whose embeddings
then have a norm, too. In ALBERT (Lan et al. 1909.11942) all layers have the
same parameters (`share_layers`), and the embeddings [V, D] are a product
[V, E] [E, D] (`embed_dim`); tied logits use both factors again.
"""

import math

import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import EncoderConfig
from efficient_attn.layers.embed import Embed
from efficient_attn.layers.param import Projection, value_of
from efficient_attn.models.lm import LM


class Encoder(LM):
  """Maps tokens to the logits of each, by those on both sides of it."""

  def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
    super().__init__(
      config,
      causal=False,
      embed_norm=config.norm_position == 'post',
      embed_dim=config.embed_dim,
      tied=config.share_layers,
      rngs=rngs,
    )

  @property
  def head(self):
    """What maps the vectors of `hidden` to logits."""
    head = super().head
    return head if self.widen is None else NarrowHead(self.widen, head)


class NarrowHead(nnx.Module):
  """Maps [B, T, D] to logits by a projection to E, backwards, and a table."""

  def __init__(self, widen: Projection, table: Embed):
    self.widen, self.table = widen, table
    narrow, wide = widen.weight.shape
    self.scale = math.sqrt(narrow / wide)  # logits then begin as those of D

  def logits(self, x):
    """Maps [B, T, D] to float32 logits [B, T, vocab]."""
    weight = value_of(self.widen.weight, x.dtype)
    return self.table.logits(jnp.einsum('btd,ed->bte', x, weight) * self.scale)
