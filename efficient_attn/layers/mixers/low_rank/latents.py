"""Perceiver (Jaegle et al. 2103.03206) and Set Transformer (Lee et al.).

A few learned latents read the tokens, and the tokens read the latents:

  z = Attend(latents, x);  z = Attend(z, z), `num_layers` times
  y = W_o attention(W_q x, W_k z, W_v z)

The last line makes the Perceiver a token mixer, as the decoder of Perceiver IO
(2107.14795) does with its own queries; the residual connection and the
feed-forward layer of that decoder are those of the block around the mixer. The
same holds of the induced set attention block (ISAB, 1810.00825), which is one
Attend with norms behind instead of before. O(T num_latents + num_latents^2)
time. The latents mix all tokens: there is no causal form.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.context import Context
from efficient_attn.layers.cross_attention import CrossAttention
from efficient_attn.layers.ffn import MLP
from efficient_attn.layers.mixer import WholeMixer
from efficient_attn.layers.norm import LayerNorm
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.values import Positive


class Latents(WholeMixer):
  """What the two share: the latents, and reading them back."""

  def __init__(self, *, d_model, num_heads, rngs, num_latents, implementation):
    # As in the Perceiver: a normal cut at 2 of standard deviation 0.02.
    latents = jax.random.truncated_normal(
      rngs.params(), -2, 2, (num_latents, d_model)
    )
    self.latents = param(0.02 * latents, (None, 'embed'), weight_decay=False)
    self.read = CrossAttention(
      d_model, num_heads, rngs=rngs, implementation=implementation
    )

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    latents = value_of(self.latents, x.dtype)
    latents = jnp.broadcast_to(latents, (x.shape[0], *latents.shape))
    latents = self.summary(sharding.constrain(latents, 'batch', None, None), x)
    return read(self.read, x, latents)


class Perceiver(Latents):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_latents: Positive = 64,
    num_layers: Positive = 2,
    implementation: str | None = None,
  ):
    del causal  # always False, as the row says
    shared = dict(d_model=d_model, num_heads=num_heads, rngs=rngs)
    shared |= dict(implementation=implementation)
    super().__init__(num_latents=num_latents, **shared)
    self.layers = nnx.List(LatentLayer(**shared) for _ in range(1 + num_layers))
    self.norm = LayerNorm(d_model)

  def summary(self, latents, x):
    """Returns the latents after they have read x."""
    cross, *layers = self.layers
    latents = cross(latents, x)
    for layer in layers:
      latents = layer(latents)
    return self.norm(latents)


class LatentLayer(nnx.Module):
  """Attention of latents to tokens or to each other, and an MLP; norms before.

  Tokens come normalised from the block. The MLP is not wider than its input.
  """

  def __init__(self, d_model, num_heads, *, rngs, implementation):
    self.norm, self.mlp_norm = LayerNorm(d_model), LayerNorm(d_model)
    self.attention = CrossAttention(
      d_model, num_heads, rngs=rngs, implementation=implementation
    )
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    self.mlp = MLP(d_model, d_model, gelu, rngs=rngs)

  def __call__(self, latents, tokens=None):
    """Maps latents [B, L, D] to the same shape."""
    query = self.norm(latents)
    memory = query if tokens is None else tokens
    latents = latents + read(self.attention, query, memory)
    return latents + self.mlp(self.mlp_norm(latents))


class SetTransformer(Latents):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    num_latents: Positive = 32,
    implementation: str | None = None,
  ):
    del causal  # always False, as the row says
    shared = dict(d_model=d_model, num_heads=num_heads, rngs=rngs)
    shared |= dict(implementation=implementation)
    super().__init__(num_latents=num_latents, **shared)
    self.attention = CrossAttention(**shared)
    self.norm, self.feed_norm = LayerNorm(d_model), LayerNorm(d_model)
    self.feed = Projection(
      {'embed': d_model}, {'embed_out': d_model}, bias=True, rngs=rngs
    )

  def summary(self, latents, x):
    """Returns the multihead attention block MAB(latents, x)."""
    latents = self.norm(latents + read(self.attention, latents, x))
    return self.feed_norm(latents + jax.nn.relu(self.feed(latents)))


def read(attention: CrossAttention, x, memory) -> jax.Array:
  """Returns the reads of x [B, T, D] in a memory [B, S, D]."""
  return attention(x, Context(memory=memory))[0]
