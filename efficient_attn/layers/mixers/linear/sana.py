"""The linear attention of SANA (Xie et al. 2410.10629).

  o_t = S^T relu(q_t) / (z . relu(q_t))   S = sum_s relu(k_s) v_s^T
                                          z = sum_s relu(k_s)

SANA is an encoder, whose sums run over the image; a causal model sums up to t.
Where no key shares a positive channel with the query, the output is zero.
`qk_norm` normalises queries and keys (over each head) before the relu.
"""

import jax
from flax import nnx

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.norm import RMSNorm


class Sana(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, *, qk_norm: bool = False, **options):
    super().__init__(**options)
    self.norms = nnx.List(
      [RMSNorm(self.heads[1]), RMSNorm(self.heads[1])] if qk_norm else []
    )

  def features(self, q, k, positions):
    """Returns relu(q), relu(k), normalised before if so chosen."""
    if self.norms:
      q, k = (norm(x) for norm, x in zip(self.norms, (q, k), strict=True))
    return jax.nn.relu(q), jax.nn.relu(k)
