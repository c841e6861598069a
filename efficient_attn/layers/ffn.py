"""Feed-forward layers: the plain MLP and the gated linear unit."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.param import Projection
from efficient_attn.values import NonNegativeFloat


def gelu(x: jax.Array) -> jax.Array:
  """Returns x P(N(0, 1) <= x) (1606.08415), as in BERT and ViT."""
  return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
  """Returns the approximation of gelu by tanh, as in GPT-2 and Gemma."""
  return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: jax.Array) -> jax.Array:
  """Returns the approximation x sigmoid(1.702 x) of gelu, as in CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


def relu2(x: jax.Array) -> jax.Array:
  """Returns relu(x)^2 (Primer, 2109.08668)."""
  return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': gelu,
  'gelu_tanh': gelu_tanh,
  'relu': jax.nn.relu,
  'relu2': relu2,
  'quick_gelu': quick_gelu,
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

  def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    del context
    return self.down(self.activation(self.up(x)))


class GLU(nnx.Module):
  """y = W_down (act(W_gate x) * W_up x) (Shazeer, 2002.05202).

  SwiGLU with silu, GEGLU with gelu. The default width, 8/3 D rounded up to a
  multiple of 32, gives it the parameters of an MLP of width 4 D.

  Args:
    d_model: D.
    ffn_dim: the width between; 0: the default.
    activation: act above.
    bias: whether each projection has one.
    limit: the largest gate, and the largest absolute value of what it
      multiplies; 0: none. gpt-oss has 7.
    offset: added to what the gate multiplies; gpt-oss has 1.
    gate_scale: of what act reads, as in Falcon-H1.
    rngs: of the parameters.
  """

  def __init__(
    self,
    d_model: int,
    ffn_dim: int,
    activation,
    *,
    bias: bool = False,
    limit: NonNegativeFloat = 0.0,
    offset: float = 0.0,
    gate_scale: float = 1.0,
    rngs,
  ):
    ffn_dim = ffn_dim or glu_width(d_model)
    embed, ffn = {'embed': d_model}, {'ffn': ffn_dim}
    self.gate = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.up = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.down = Projection(ffn, embed, bias=bias, rngs=rngs)
    self.activation = activation
    self.limit, self.offset = limit, offset
    self.gate_scale = gate_scale

  def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    del context
    gate, up = self.gate(x), self.up(x)
    gate = gate if self.gate_scale == 1 else gate * self.gate_scale
    return self.down(gated(gate, up, self.activation, self.limit, self.offset))


def glu_width(d_model: int) -> int:
  """Returns the default width of a GLU, 8/3 D up to a multiple of 32."""
  return -(-8 * d_model // 96) * 32


def gated(
  gate: jax.Array, up: jax.Array, activation, limit: float, offset: float
) -> jax.Array:
  """Returns act(gate) * (up + offset), clamped to `limit` unless that is 0."""
  if limit:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return activation(gate) * (up + offset if offset else up)
