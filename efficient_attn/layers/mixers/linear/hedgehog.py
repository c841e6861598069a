"""Hedgehog (Zhang et al. 2402.04347).

  o_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = phi_q(q_t) . phi_k(k_s)
  phi(x) = softmax([W x, -W x])        2 H wide

with a learned W for the queries and one for the keys of each head, the identity
at init. The softmax is over the features: the exponentials of the paper, as it
computes them, without overflow. fla's map is softmax([2 y, -2 y]), y = W x + b.
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.mixers.linear.kernel import KernelAttention
from efficient_attn.layers.param import param, value_of
from efficient_attn.ops.recurrent import feature_maps


class Hedgehog(KernelAttention):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(self, **options):
    super().__init__(**options)
    heads, head_dim = self.heads
    identity = jnp.tile(jnp.eye(head_dim), (heads, 1, 1))
    axes = ('heads', 'head_dim', 'features')
    self.maps = nnx.List(
      param(identity, axes, weight_decay=False) for _ in range(2)
    )

  def features(self, q, k, positions):
    """Returns phi_q(q), phi_k(k)."""
    return tuple(
      feature_maps.softmax_pair(
        jnp.einsum('btnh,nhf->btnf', x, value_of(weight, x.dtype))
      )
      for weight, x in zip(self.maps, (q, k), strict=True)
    )
