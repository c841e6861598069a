"""Encoders like BERT, to count their parameters and to time them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import ops
from efficient_attn.layers.embed import Embed
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.layers.param import Projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
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


class Layer(nnx.Module):
  """Attention and a feed-forward layer with biases, each behind its norm."""

  def __init__(self, shape: Encoder, *, rngs: nnx.Rngs):
    embed = {'embed': shape.width}
    heads = {'heads': shape.heads, 'head_dim': shape.width // shape.heads}

    def project(inputs, outputs):
      return Projection(inputs, outputs, bias=True, rngs=rngs)

    self.query, self.key, self.value = (project(embed, heads) for _ in range(3))
    self.out = project(heads, embed)
    self.up = project(embed, {'ffn': shape.ffn})
    self.down = project({'ffn': shape.ffn}, embed)
    self.mixer_norm, self.ffn_norm = (LayerNorm(shape.width) for _ in range(2))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to the same."""
    heads = self.query(x), self.key(x), self.value(x)
    x = self.mixer_norm(x + self.out(ops.attention(*heads)))
    return self.ffn_norm(x + self.down(jax.nn.gelu(self.up(x))))


class Bert(nnx.Module):
  """Maps tokens [B, T] to [B, T, D] (Devlin et al. 1810.04805).

  With `embed` and `shared` it is ALBERT (Lan et al. 1909.11942).
  """

  def __init__(self, shape: Encoder, *, rngs: nnx.Rngs):
    narrow = shape.embed or shape.width
    self.words = Embed(shape.vocab, narrow, rngs=rngs)
    self.positions = Embed(512, narrow, rngs=rngs)
    self.types = Embed(shape.types, narrow, rngs=rngs) if shape.types else None
    self.norm = LayerNorm(narrow)

    def project(inputs):
      return Projection(
        {'narrow': inputs}, {'embed': shape.width}, bias=True, rngs=rngs
      )

    self.widen = project(narrow) if shape.embed else None
    self.layers = nnx.List(
      Layer(shape, rngs=rngs)
      for _ in range(1 if shape.shared else shape.layers)
    )
    self.pooler = project(shape.width) if shape.pooler else None
    self.repeats = shape.layers if shape.shared else 1

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Runs the encoder; the pooler is for a task's head."""
    x = self.words(tokens, jnp.float32)
    x = x + self.positions(jnp.arange(tokens.shape[1])[None], jnp.float32)
    if self.types is not None:
      x = x + self.types(jnp.zeros_like(tokens), jnp.float32)
    x = self.norm(x)
    x = x if self.widen is None else self.widen(x)
    for _ in range(self.repeats):
      for layer in self.layers:
        x = layer(x)
    return x
