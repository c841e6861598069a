"""Reformer's LSH attention (Kitaev et al. 2001.04451).

  o_t = sum_s softmax_s(q_t . q_s / |q_s|) v_s

over the other tokens s that share a hash bucket with t in one of `num_hashes`
rounds, in chunks of `chunk_size` and the chunk before; see
`ops.routed.lsh_attention` for how these chunks differ from the published ones,
which leak the future. The paper advises num_buckets = 2 T / chunk_size, as a
tuple of factors if it is large. O(T log T + num_hashes T chunk_size). The
rotations are drawn from `seed` and never change; the paper draws new ones for
every batch. Tokens are hashed without their positions, which are rotary here
(the paper adds axial embeddings to the model's input). The cache holds the key,
the value and the buckets of every past token.
"""

import math

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import Routed
from efficient_attn.layers.norm import l2_normalize
from efficient_attn.layers.param import Projection
from efficient_attn.ops.routed.lsh_attention import lsh_attention, lsh_buckets
from efficient_attn.values import Positive, Seed


class Reformer(Routed):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    num_hashes: Positive = 4,
    num_buckets: Positive | tuple[Positive, ...] = 64,
    chunk_size: Positive = 64,
    seed: Seed = 0,
    **options,
  ):
    super().__init__(**options)
    if isinstance(num_buckets, int):
      num_buckets = (num_buckets,)
    if any(factor < 2 or factor % 2 for factor in num_buckets):
      raise ConfigError(f'num_buckets={num_buckets} must be even')
    axes = dict(zip(('heads', 'head_dim'), self.heads, strict=True))
    self.query, self.value = (
      Projection({'embed': options['d_model']}, axes, rngs=options['rngs'])
      for _ in range(2)
    )
    self.num_hashes = num_hashes
    self.factors = tuple(num_buckets)
    self.chunk_size = chunk_size
    self.seed = seed

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    plain = self.query(x)
    query = self.rotation(x, context, cache)(plain)
    bucket = sharding.local_op(lsh_buckets, ('BTNH', 'N___'), 'BTN_')
    (key, value, buckets), cache, offset = recall(
      context,
      cache,
      key=l2_normalize(query),
      value=self.value(x),
      buckets=bucket(plain, self.rotations()),
    )

    layouts = ('BTNH', 'BSNH', 'BSNV', 'BSN_')
    o = sharding.local_op(lsh_attention, layouts, 'BTNV', offset='')(
      *(query, key, value, buckets),
      num_buckets=math.prod(self.factors),
      chunk_size=self.chunk_size,
      causal=self.causal,
      offset=offset,
    )
    return self.out(o), cache

  def rotations(self) -> list[jax.Array]:
    """The R of every factor of the number of buckets."""
    heads, dim = self.heads
    keys = jax.random.split(jax.random.key(self.seed), len(self.factors))
    return [
      jax.random.normal(key, (heads, self.num_hashes, dim, factor // 2))
      for key, factor in zip(keys, self.factors, strict=True)
    ]

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    buckets = (self.heads[0], self.num_hashes)
    return super().init_cache(
      batch, max_len, dtype, buckets=buckets, dtypes={'buckets': jnp.int32}
    )
