"""Time mixing of RWKV-4 (Peng et al. 2305.13048).

  r, k, v = W_r x^r, W_k x^k, W_v x^v      x^s_t = mu_s x_t + (1 - mu_s) x_{t-1}
  out = W_o (sigmoid(r) * wkv(k, v))

where wkv is an average of the past values whose weights exp(k) decay by a
learned rate per channel (see `ops.wkv4`). Rates, bonus and mu start as in
RWKV-LM: slow to fast over the channels.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.headwise import split_heads
from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.recurrence import Recurrence
from efficient_attn.layers.token_shift import Shifted
from efficient_attn.ops.recurrent.wkv4 import wkv4
from efficient_attn.values import ChunkSize, Fraction


class RWKV4(Shifted):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `depth` is the place of the layer in its model, 0 for the first and 1 for the
  last: later layers start with slower decays and more of the present token.
  RWKV-LM takes l / L for the share of layer l, and l / (L - 1) for the rest.
  """

  recurrence = Recurrence(
    wkv4,
    dict(k='BTNH', v='BTNH', log_decay='NH', bonus='NH'),
    state=('BNH',) * 3,
  )

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    depth: Fraction = 0.0,
    chunk_size: ChunkSize = 64,
  ):
    del causal  # always True, as the row says
    heads = split_heads(d_model, num_heads)
    shape, embed = tuple(heads.values()), {'embed': d_model}
    self.receptance, self.key, self.value = (
      Projection(embed, heads, rngs=rngs) for _ in range(3)
    )
    self.out = Projection(heads, embed, rngs=rngs)
    ramp = jnp.arange(d_model) / d_model
    mix = ramp ** (1 - depth)
    self.mix_key = param(mix, (None,))
    self.mix_value = param(mix + 0.3 * depth, (None,))
    self.mix_receptance = param(ramp ** (0.5 * (1 - depth)), (None,))
    # exp(-exp(.)) is the decay.
    speed = jnp.linspace(0.0, 1.0, d_model) ** (0.7 + 1.3 * depth)
    self.rate = param((-5 + 8 * speed).reshape(shape), (*heads,))
    zigzag = (jnp.arange(d_model) + 1) % 3 - 1.0
    bonus = math.log(0.3) + 0.5 * zigzag
    self.bonus = param(bonus.reshape(shape), (*heads,))
    self.d_model = d_model
    self.sizes = dict(N=shape[0], H=shape[1])
    self.options = dict(chunk_size=chunk_size)

  def recur(self, x, context, past):
    """Returns y, the state and the tails; see `Recurrent`."""
    previous, last = self.shifted(x, context, past)

    def mixed(mu):
      mu = value_of(mu, x.dtype)
      return mu * x + (1 - mu) * previous

    receptance = jax.nn.sigmoid(self.receptance(mixed(self.mix_receptance)))
    wkv, state = self.scan(
      context,
      past,
      k=self.key(mixed(self.mix_key)),
      v=self.value(mixed(self.mix_value)),
      log_decay=-jnp.exp(value_of(self.rate, jnp.float32)),
      bonus=value_of(self.bonus, jnp.float32),
    )
    return self.out(receptance * wkv), state, last
