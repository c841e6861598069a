"""HashAttention (Desai et al. 2412.14468): top tokens by learned bits.

    o_t = sum_s softmax_s(q_t . k_s / sqrt(H)) v_s,   s in the top_k of -h_ts
    h_ts = Hamming distance of sign f(q_t) and sign g(k_s)

where f and g are small networks to L bits; L - 2 h_ts is the product of the
signs. O(T top_k H) for the attention, O(T^2 L) for the products; memory O(T).
Signs pass gradients as tanh would, to the loss of `selected_tokens`. (The paper
fits f and g to a frozen model, by whether a token is among its top 64.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from efficient_attn.ops import chunks
from efficient_attn.ops.products import product
from efficient_attn.ops.routed.dsa import visible
from efficient_attn.ops.routed.selected_tokens import token_attention


def hash_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  query_signs: Float[Array, 'B T N L'],
  key_signs: Float[Array, 'B S K L'],
  *,
  top_k: int,
  causal: bool = True,
  offset: int | Int[Array, ''] = 0,
  segment_ids: Int[Array, 'B S'] | None = None,
  starts: Int[Array, 'B T'] | None = None,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]:
  """Attention to the tokens whose signs agree best with the query's.

  Args:
    query: queries, of the tokens from `offset` on.
    key: keys.
    value: values.
    query_signs: 1 or -1, by `signs`.
    key_signs: 1 or -1.
    top_k: tokens of a query and head.
    causal: whether later tokens are hidden.
    offset: the index of the first query among the keys.
    segment_ids: of all tokens, where T = S; a segment ends where the id
      changes, and segments do not see each other.
    starts: the first key that each query may see.

  Returns:
    The output, in the query's dtype, and the loss of the signs,
    of every head.
  """
  B, T, N = query.shape[:3]
  K, L = key_signs.shape[2:]
  if segment_ids is not None:
    segment_ids = chunks.segment_counts(segment_ids)
  place = jnp.broadcast_to(offset + jnp.arange(T), (B, T))

  def score(marks):
    query_signs, *where = marks
    C = query_signs.shape[1]
    grouped = query_signs.reshape(B, C, K, N // K, L)
    # Signs are exact in any dtype.
    scores = L**-0.5 * product(
      'bckgl,bskl->bkgcs', grouped, key_signs, operand=query.dtype
    )
    seen = visible(*where, causal, key.shape[1], segment_ids)
    scores = scores.reshape(B, N, C, -1)
    return jnp.where(seen[:, None], scores, -jnp.inf)

  marks = query_signs, place, starts, segment_ids
  return token_attention(query, key, value, score, marks, top_k=top_k)


def signs(x: Float[Array, '*rows']) -> Float[Array, '*rows']:
  """1 where x > 0 and -1 elsewhere, with the gradient of tanh."""
  soft = jnp.tanh(x)
  hard = jnp.where(x > 0, 1, -1).astype(x.dtype)
  return hard + (soft - jax.lax.stop_gradient(soft))


def pack(x: Float[Array, '*rows L']) -> UInt[Array, '*rows W']:
  """Signs in words of 32 bits."""
  bits = jnp.pad(x > 0, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)])
  bits = bits.reshape(*x.shape[:-1], -1, 32).astype(jnp.uint32)
  return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), -1, dtype=jnp.uint32)


def unpack(
  words: UInt[Array, '*rows W'], length: int, dtype
) -> Float[Array, '*rows L']:
  """The first `length` signs of packed words."""
  bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
  bits = bits.reshape(*words.shape[:-1], -1)[..., :length]
  return jnp.where(bits == 1, 1, -1).astype(dtype)
