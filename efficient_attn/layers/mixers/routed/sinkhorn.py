"""Sparse Sinkhorn attention (Tay et al. 2002.11296): blocks put in order.

  o_t = softmax([q_t K_i^T, q_t K'_i^T] / sqrt(H)) [V_i; V'_i]
  K'_i = sum_j P_ij K_j,   P from R_i = relu(W_B relu(W_P z_i + b_P) + b_B)

with i the block of t, and z_i the mean of the inputs of block i; in a decoder
that of all inputs up to the block's first. (The paper takes sums; the scale of
a mean does not grow with the length.) P is balanced by `iterations` of Sinkhorn
in an encoder, a softmax over the blocks before in a decoder; see
`ops.routed.sinkhorn_attention`. No Gumbel noise. R_i has `max_blocks` entries,
so a sequence has at most that many blocks.

O(T block_size) and O(T^2 / block_size) for the mixtures, which decoding
computes anew for every token. The cache holds every past key and value, the R
of the last block and the sum of the inputs.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.cache import recall
from efficient_attn.layers.mixers.routed.heads import GroupedHeads
from efficient_attn.layers.param import Projection
from efficient_attn.ops.pooling import block_means
from efficient_attn.ops.routed.sinkhorn_attention import (
  earlier,
  sinkhorn,
  sinkhorn_attention,
)
from efficient_attn.values import Positive, PositiveFloat


class Sinkhorn(GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    block_size: Positive = 64,
    max_blocks: Positive = 64,
    iterations: Positive = 8,
    temperature: PositiveFloat = 0.75,
    **options,
  ):
    super().__init__(**options)
    d_model, rngs = options['d_model'], options['rngs']
    self.hidden = Projection(
      {'embed': d_model}, {'hidden': d_model}, bias=True, rngs=rngs
    )
    self.sort = Projection(
      {'hidden': d_model},
      {'heads': self.kv_heads[0], 'blocks': max_blocks},
      bias=True,
      rngs=rngs,
    )
    self.block_size = block_size
    self.max_blocks = max_blocks
    self.iterations = iterations
    self.temperature = temperature

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    old, total = cache.state if cache else (None, None)
    summarize = sharding.local_op(
      self.summarize, ('BTD', 'BD'), ('BTD', 'BD'), offset=''
    )
    offset = cache.cursor.length if cache else 0
    means, total = summarize(x, total, offset=offset)
    logits = jax.nn.relu(self.sort(jax.nn.relu(self.hidden(means))))
    query, key, value = self.project(x, context, cache)
    (key, value), after, _ = recall(context, cache, key=key, value=value)
    length = key.shape[1]
    number = -(-length // self.block_size)
    if number > self.max_blocks:
      raise ConfigError(
        f'a sequence of {length} has {number} blocks of {self.block_size}, more'
        f' than max_blocks={self.max_blocks}; set max_blocks or block_size'
      )
    attend = functools.partial(
      sinkhorn_attention, block_size=self.block_size, causal=self.causal
    )

    def op(query, key, value, logits, row, *, offset):
      first = offset // self.block_size
      if row is not None:
        started = offset % self.block_size > 0
        here = jnp.where(started, row, logits[:, :1])
        logits = logits.at[:, :1].set(here.astype(logits.dtype))
        last = (offset + query.shape[1] - 1) // self.block_size - first
        here = jax.lax.dynamic_slice_in_dim(logits, last, 1, 1)
        row = here.astype(row.dtype)
      rows = logits[..., :number].swapaxes(1, 2).astype(jnp.float32)
      rows = rows / self.temperature
      if self.causal:
        order = earlier(rows, first)
      else:
        order = sinkhorn(rows, self.iterations)
      return attend(query, key, value, order, offset=offset), row

    layouts = ('BTNH', 'BSKH', 'BSKV', 'BTK_', 'BTK_')
    op = sharding.local_op(op, layouts, ('BTNV', 'BTK_'), offset='')
    o, row = op(query, key, value, logits, old, offset=offset)
    return self.out(o), after and after.replace(state=(row, total))

  def summarize(self, x, total, *, offset):
    """The z of the blocks that hold new tokens, and the sum of all inputs."""
    x32 = x.astype(jnp.float32)
    sums = jnp.cumsum(x32, 1)
    if total is not None:
      sums = total[:, None] + sums
    if self.causal:
      rows = (x.shape[1] - 2) // self.block_size + 2
      first = offset // self.block_size
      starts = (first + jnp.arange(rows)) * self.block_size
      found = jnp.clip(starts - offset, 0, x.shape[1] - 1)
      means = sums[:, found] / (starts + 1)[:, None]
    else:
      means = block_means(x32, self.block_size)
    return means.astype(x.dtype), sums[:, -1]

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns room for `max_len` tokens; writing past it is wrong."""
    shape = (batch, 1, self.kv_heads[0], self.max_blocks)
    row = jnp.zeros(shape, dtype)
    total = jnp.zeros((batch, self.hidden.weight.shape[0]))
    return super().init_cache(batch, max_len, dtype, state=(row, total))
