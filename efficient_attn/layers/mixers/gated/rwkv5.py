"""RWKV-5 "Eagle" (Peng et al. 2404.05892): static decays, bonus, token shift.

  S_t = diag(w) S_{t-1} + k_t v_t^T     w = exp(-exp(w_0)) per key channel
  o_t = S_{t-1}^T r_t + (r_t . (u * k_t)) v_t
  y_t = W_o (groupnorm(o_t) * silu(g_t))

where each of r, k, v and g projects its own mixture of x_t and x_{t-1}.
The published initial values depend on the depth of the layer in the network;
these are the ones of its middle.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.head_norm import HeadLayerNorm
from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import LINEAR, Recurrence
from efficient_attn.layers.token_shift import Shifted
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.values import ChunkSize, PositiveFloat

DEPTH = 0.5


def _wkv(q, k, v, log_decay, **options):
  """RWKV's read; a decay [N, H] is the same for all tokens."""
  log_decay = jnp.broadcast_to(log_decay, q.shape)
  return linear_attention(
    q, k, v, log_decay=log_decay, read='exclusive', scale=1, **options
  )


class RWKV5(Shifted):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  recurrence = Recurrence(
    _wkv, {**LINEAR.inputs, 'log_decay': 'NH', 'bonus': 'NH'}, state='BNHV'
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    norm_eps: PositiveFloat = 64e-5,
    chunk_size: ChunkSize = 64,
  ):
    inputs, heads = {'embed': d_model}, split_heads(d_model, num_heads)
    head_dim = heads['head_dim']
    self.receptance, self.key, self.value, self.gate = (
      Projection(inputs, heads, rngs=rngs) for _ in range(4)
    )
    # How much of the previous token goes into r, k, v and g.
    self.shifts = param(
      jnp.stack([shift_init(d_model, name) for name in 'rkvg']),
      (None, 'embed'),
    )
    channel = jnp.arange(d_model) / (d_model - 1)
    decay = -6 + 5 * channel ** (0.7 + 1.3 * DEPTH)
    self.decay = param(
      decay.reshape(num_heads, head_dim), (*heads,), weight_decay=False
    )
    zigzag = 0.1 * ((jnp.arange(d_model) + 1) % 3 - 1)
    bonus = DEPTH * (1 - channel) + zigzag
    self.bonus = param(bonus.reshape(num_heads, head_dim), (*heads,))
    # The paper divides o by 8 before a norm with eps = 1e-5.
    self.norm = HeadLayerNorm(num_heads, head_dim, eps=norm_eps)
    self.out = Projection(heads, inputs, rngs=rngs)
    self.sizes = dict(N=num_heads, H=head_dim, V=head_dim)
    self.options = dict(chunk_size=chunk_size)
    self.d_model = d_model

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    previous, last = self.shifted(x, context, past)
    r, k, v, g, log_decay = self.inputs(x, previous - x)
    o, state = self.scan(
      context,
      past,
      q=self.receptance(r),
      k=self.key(k),
      v=self.value(v),
      log_decay=log_decay,
      bonus=value_of(self.bonus, jnp.float32),
    )
    return self.out(self.norm(o) * jax.nn.silu(self.gate(g))), state, last

  def inputs(self, x, delta):
    """Returns the inputs of r, k, v and g, and the log decay."""
    shifts = value_of(self.shifts, x.dtype)
    mixed = [x + delta * shifts[i] for i in range(4)]
    return *mixed, -jnp.exp(value_of(self.decay, jnp.float32))


def shift_init(d_model: int, name: str) -> jax.Array:
  """The initial share of the previous token per channel, [D]."""
  power = (1 - DEPTH) * (0.5 if name in 'rg' else 1)
  present = (jnp.arange(d_model) / d_model) ** power
  return 1 - present - (0.3 * DEPTH if name == 'v' else 0)
