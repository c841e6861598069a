"""Channel mixing of RWKV-4 (Peng et al. 2305.13048), an ffn with a past.

  y = sigmoid(W_r x^r) * W_down act(W_up x^k)
  x^s_t = mu_s x_t + (1 - mu_s) x_{t-1}

act is relu^2 as published, model.activation='relu2'. What it keeps of the past
is the last token. mu starts as in RWKV-LM.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.param import Projection, param, value_of
from efficient_attn.layers.token_shift import Shifted
from efficient_attn.values import Fraction


class ChannelMix(Shifted):
  """Ffn [B, T, D] -> [B, T, D] by the contract of mixers, `layers.mixer`.

  `depth` is the place of the layer in its model, see `RWKV4`.
  """

  def __init__(
    self,
    d_model: int,
    ffn_dim: int,
    activation,
    *,
    bias: bool = False,
    depth: Fraction = 0.0,
    rngs: nnx.Rngs,
  ):
    embed, ffn = {'embed': d_model}, {'ffn': ffn_dim or 4 * d_model}
    self.up = Projection(embed, ffn, bias=bias, rngs=rngs)
    self.down = Projection(ffn, embed, bias=bias, rngs=rngs)
    self.receptance = Projection(embed, {'gate': d_model}, bias=bias, rngs=rngs)
    mix = (jnp.arange(d_model) / d_model) ** (1 - depth)
    self.mix_key, self.mix_receptance = (param(mix, (None,)) for _ in range(2))
    self.activation = activation
    self.d_model = d_model

  def recur(self, x, context, past):
    """Returns y, no state and the tails; see `Recurrent`."""
    previous, last = self.shifted(x, context, past)

    def mixed(mu):
      mu = value_of(mu, x.dtype)
      return mu * x + (1 - mu) * previous

    y = self.down(self.activation(self.up(mixed(self.mix_key))))
    gate = jax.nn.sigmoid(self.receptance(mixed(self.mix_receptance)))
    return gate * y, None, last

  def init_state(self, batch, max_len, dtype):
    """Returns None: all it keeps are the tails."""
    return None
