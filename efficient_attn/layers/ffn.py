"""Feed-forward layers: the plain MLP and the gated linear unit."""

import jax
from flax import nnx

from efficient_attn.layers.param import Projection


def gelu(x: jax.Array) -> jax.Array:
  """Returns x P(N(0, 1) <= x) (1606.08415), as in BERT and ViT."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """Returns the approximation of gelu by tanh, as in GPT-2 and Gemma."""
  return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': gelu,
  'gelu_tanh': gelu_tanh,
  'relu': jax.nn.relu,
  'sigmoid': jax.nn.sigmoid,
}


class MLP(nnx.Module):
  """y = W_down act(W_up x), with a bias on each projection if `bias`."""

  def __init__(
    self, d_model: int, ffn_dim: int, activation, *, bias: bool = False, rngs
  ):
    embed, ffn = {'embed': d_model}, {'ffn': ffn_dim or 4 * d_model}
    self.up = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.down = Projection(ffn, embed, bias=bias, rngs=rngs)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    return self.down(self.activation(self.up(x)))


class GLU(nnx.Module):
  """y = W_down (act(W_gate x) * W_up x) (Shazeer, 2002.05202).

  SwiGLU with silu, GEGLU with gelu. The default width, 8/3 D rounded up to a
  multiple of 32, gives it the parameters of an MLP of width 4 D. `bias` puts
  one on each projection.
  """

  def __init__(
    self, d_model: int, ffn_dim: int, activation, *, bias: bool = False, rngs
  ):
    ffn_dim = ffn_dim or -(-8 * d_model // 96) * 32
    embed, ffn = {'embed': d_model}, {'ffn': ffn_dim}
    self.gate = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.up = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.down = Projection(ffn, embed, bias=bias, rngs=rngs)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    return self.down(self.activation(self.gate(x)) * self.up(x))


# None: a block is a mixer alone, as in Mamba.
FFNS = {'glu': GLU, 'mlp': MLP, 'none': None}
