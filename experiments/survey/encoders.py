"""Encoders like BERT, to count their parameters and to time them."""

import dataclasses

import jax
from flax import nnx

from efficient_attn.config import EncoderConfig
from efficient_attn.layers.embed import Embed
from efficient_attn.layers.param import Projection
from efficient_attn.models.encoder import Encoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """The shape of an encoder; the defaults are BERT-base.

  Attributes:
    layers: how many run.
    width: of the model.
    heads: of attention.
    ffn: width of the feed-forward layer.
    vocab: of the embeddings.
    embed: their width, 0 for that of the model.
    types: kinds of segments with an embedding of their own.
    pooler: whether the first token has a last layer.
    shared: whether all layers have the same parameters.
  """

  layers: int = 12
  width: int = 768
  heads: int = 12
  ffn: int = 3072
  vocab: int = 30_522
  embed: int = 0
  types: int = 2
  pooler: bool = True
  shared: bool = False

  def config(self) -> EncoderConfig:
    """Returns the config of the encoder, without types and pooler."""
    return EncoderConfig(
      num_layers=self.layers,
      d_model=self.width,
      num_heads=self.heads,
      ffn='mlp',
      ffn_dim=self.ffn,
      ffn_bias=True,
      activation='gelu_tanh',
      norm='layernorm',
      norm_position='post',
      vocab_size=self.vocab,
      position='learned',
      max_len=512,
      mixers={'attention': dict(position='none', qkv_bias=True, out_bias=True)},
      embed_dim=self.embed,
      share_layers=self.shared,
    )


class Bert(nnx.Module):
  """Maps tokens [B, T] to [B, T, D] (Devlin et al. 1810.04805).

  With `embed` and `shared` it is ALBERT (Lan et al. 1909.11942). The types,
  which add a row to each embedding, and the pooler count but do not run.
  """

  def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
    self.encoder = Encoder(shape.config(), rngs=rngs)
    if shape.types:
      width = shape.embed or shape.width
      self.types = Embed(shape.types, width, rngs=rngs)
    if shape.pooler:
      self.pooler = Projection(
        {'pooled': shape.width}, {'embed': shape.width}, bias=True, rngs=rngs
      )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Runs the encoder."""
    return self.encoder.hidden(tokens)[0]
