"""HashAttention (Desai et al. 2412.14468): the keys whose bits agree best.

  o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k of -h_ts
  h_ts = Hamming distance of sign f(q_t) and sign g(k_s)

where f and g are MLPs of two hidden layers of H per head, to `num_bits`. They
see rotated and detached queries and keys, and learn from the divergence of the
softmax of the agreement over the chosen tokens from the weights of the
attention, which is added to the gradient of the model's loss. (The paper fits
them to a frozen model, by whether a token is among its top 64.) O(T top_k), and
O(T^2 num_bits) for the distances. The cache holds every past key and value, and
the bits of every key. In an encoder every token may be chosen.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import (
  GroupedHeads,
  attach,
  spans,
  token_op,
)
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.ops.products import exact
from efficient_attn.ops.routed import hash_attention as ops
from efficient_attn.values import Positive


class Signature(nnx.Module):
  """An MLP a head, from [B, T, N, H] to the logits of bits."""

  def __init__(self, heads: int, dim: int, num_bits: int, *, rngs: nnx.Rngs):
    def matrix(outputs):
      weight = fan_in_normal()(rngs.params(), (heads, dim, outputs), dim)
      return param(weight, ('heads', None, None), weight_decay=True)

    self.matrices = nnx.List(matrix(n) for n in (dim, dim, num_bits))

  def weights(self) -> list[jax.Array]:
    """Returns them in float32: signs do not forgive rounding."""
    return [value_of(p, jnp.float32) for p in self.matrices]


def signature(x, matrices):
  """The signs of the MLP of x, which is detached."""
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  for i, matrix in enumerate(matrices):
    x = jax.nn.silu(x) if i else x
    x = exact('btnh,nhl->btnl', x, matrix)
  return ops.signs(x)


class Hash(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  packing = left_padding = True

  def __init__(
    self, *, top_k: Positive = 512, num_bits: Positive = 32, **options
  ):
    super().__init__(**options)
    self.query_bits, self.key_bits = (
      Signature(*heads, num_bits, rngs=options['rngs'])
      for heads in (self.heads, self.kv_heads)
    )
    self.top_k = top_k
    self.num_bits = num_bits

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    query, key, value = self.project(x, context, cache)
    sign = sharding.local_op(signature, ('BTNH', 'N__'), 'BTNL')
    query_signs = sign(query, self.query_bits.weights())
    bits = sign(key, self.key_bits.weights())
    if cache is not None:
      bits = ops.pack(bits)
    (key, value, bits), after, offset = recall(
      context, cache, key=key, value=value, bits=bits
    )
    if cache is not None:
      bits = ops.unpack(bits, self.num_bits, query_signs.dtype)
    op = token_op(ops.hash_attention, 'BTNL', 'BSKL')
    o, loss = op(
      *(query, key, value, query_signs, bits),
      top_k=self.top_k,
      causal=self.causal,
      **spans(context, cache, offset, x.shape[1]),
    )
    return attach(self.out(o), jnp.sum(loss, -1)), after

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    bits = (self.kv_heads[0], -(-self.num_bits // 32))
    return super().init_cache(
      batch, max_len, dtype, bits=bits, dtypes={'bits': jnp.uint32}
    )
