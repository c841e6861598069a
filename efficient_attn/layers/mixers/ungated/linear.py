"""Linear attention, "Transformers are RNNs" (Katharopoulos et al. 2006.16236).

S_t = S_{t-1} + phi(k_t) v_t^T    z_t = z_{t-1} + phi(k_t)
o_t = S_t^T phi(q_t) / (z_t . phi(q_t))        phi(x) = elu(x) + 1
"""

import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import choose
from efficient_attn.layers.param import Projection
from efficient_attn.layers.qkv import QKV
from efficient_attn.layers.recurrence import run_op
from efficient_attn.ops.feature_maps import FEATURE_MAPS
from efficient_attn.ops.linear_attention import linear_attention


class Linear(nnx.Module):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    feature_map: str = 'elu_plus_one',
    chunk_size: int = 64,
  ):
    self.feature_map = choose('feature_map', feature_map, FEATURE_MAPS)
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.heads = heads
    self.options = dict(
      normalize=True, bidirectional=not causal, chunk_size=chunk_size
    )

  def __call__(self, x, *, positions=None, segment_ids=None, cache=None):
    """Mixes tokens; see `layers.mixers` for the contract."""
    (q, k, v), _ = self.qkv(x)
    o, state = run_op(
      linear_attention,
      dict(q=self.feature_map(q), k=self.feature_map(k), v=v),
      segment_ids=segment_ids,
      state=cache and cache['state'],
      **self.options,
    )
    return self.out(o), cache and dict(state=state)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns the zero state, (S, z); `max_len` does not matter."""
    n, h = self.heads
    return dict(state=(jnp.zeros((batch, n, h, h)), jnp.zeros((batch, n, h))))
