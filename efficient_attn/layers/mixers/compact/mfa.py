"""Multi-matrix factorization attention, MFA (Hu et al. 2412.19255).

  q_t = W^U_n W^D x_t                                              per head n
  o_t = sum_s softmax_s(rope(q_t) . rope(W_K x_s) / sqrt(H)) W_V x_s

Many wide heads share one key and one value of the same width H, larger than
usual, and their queries are factorised through `q_rank` channels (H in the
paper) so that a head costs H q_rank and not H D parameters. The cache holds 2 H
numbers a token.
"""

from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.mixers.compact.memory import Compact
from efficient_attn.layers.param import LowRank, Projection
from efficient_attn.ops import masks
from efficient_attn.ops.positions import rotary
from efficient_attn.ops.softmax.attention import attention
from efficient_attn.values import NonNegative, PositiveFloat


class MFA(Compact):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring.

  `head_dim` is 2 D / N by default, twice that of a head of MHA.
  """

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    head_dim: NonNegative = 0,
    q_rank: NonNegative = 0,
    rotary_base: PositiveFloat = 10_000.0,
    implementation: str | None = None,
  ):
    head_dim = head_dim or 2 * d_model // num_heads
    embed, shared = {'embed': d_model}, {'head_dim': head_dim}
    heads = {'heads': num_heads} | shared
    self.query = LowRank(d_model, q_rank or head_dim, heads, rngs=rngs)
    self.key = Projection(embed, shared, rngs=rngs)
    self.value = Projection(embed, shared, rngs=rngs)
    self.out = Projection(heads, embed, rngs=rngs)
    self.causal = causal
    self.widths = dict(key=(head_dim,), value=(head_dim,))
    self.rotary_base = rotary_base
    self.implementation = implementation

  def project(self, x, positions):
    """Returns queries [B, T, N, H], and one key and value [B, T, H]."""
    query = rotary(self.query(x), positions, base=self.rotary_base)
    key = self.key(x)[:, :, None]
    key = rotary(key, positions, base=self.rotary_base)[:, :, 0]
    return query, dict(key=key, value=self.value(x))

  def attend(self, query, memory, mask):
    """Attends with every head to the one key and value."""

    def op(query, key, value, mask):
      return attention(
        query,
        key[:, :, None],
        value[:, :, None],
        mask=mask,
        implementation=self.implementation,
      )

    op = sharding.local_op(
      op, ('BTNH', 'BSH', 'BSV', masks.letters(mask)), 'BTNV'
    )
    return self.out(op(query, memory['key'], memory['value'], mask))
