"""Compressive Transformer (Rae et al. 1911.05507).

Transformer-XL with a second memory: a token sees its segment of `mem_len`
tokens, the `mem_len` tokens before that, and then the last `compressed_len`
entries f(x_{jc}, ..., x_{jc+c-1}), each of c = `compression_rate` tokens that
left the memory; see `ops.softmax.compressive`. f is their mean, their maximum,
or a convolution of width and stride c. Segments are counted from the start of
the sequence, so that the result does not depend on how it is cut into calls.
The cache holds both memories; no gradient flows into it.

f learns from the gradients of the call in which its entries are read; the
auxiliary losses of the paper are left out.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError, choose
from efficient_attn.layers.cache import RecurrentCache
from efficient_attn.layers.mixer import Mixer
from efficient_attn.layers.mixers.softmax.transformer_xl import (
  RELATIVE,
  Relative,
)
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
  value_of,
)
from efficient_attn.layers.qkv import QKV
from efficient_attn.ops.softmax import compressive as ops
from efficient_attn.values import NonNegative, Positive

COMPRESSIONS = {
  'mean': lambda blocks, _: jnp.mean(blocks, axis=2),
  'max': lambda blocks, _: jnp.max(blocks, axis=2),
  'conv': lambda blocks, taps: jnp.einsum('bjcd,cde->bje', blocks, taps),
}

# The layouts of the leaves of `ops.CompressiveMemory` by rank.
MEMORY = {0: '', 4: 'BSNH'}


class Compressive(Mixer):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  packing = left_padding = False

  def __init__(
    self,
    *,
    d_model: int,
    num_heads: int,
    causal: bool,
    rngs: nnx.Rngs,
    mem_len: Positive = 512,
    compressed_len: NonNegative = 512,
    compression_rate: Positive = 2,
    compression: str = 'conv',
  ):
    del causal  # always True, as the row says
    choose('compression', compression, COMPRESSIONS)
    if mem_len % compression_rate:
      raise ConfigError(
        f'compressive: mem_len={mem_len} is not a multiple of '
        f'compression_rate={compression_rate}'
      )
    heads = (num_heads, d_model // num_heads)
    self.qkv = QKV(d_model, query=heads, key=heads, value=heads, rngs=rngs)
    self.relative = Relative(d_model, *heads, rngs=rngs)
    if compression == 'conv':
      shape = (compression_rate, d_model, d_model)
      taps = fan_in_normal()(rngs.params(), shape, compression_rate * d_model)
      self.taps = param(taps, (None, 'embed', None), inputs=2)
    else:
      self.taps = None
    self.out = Projection(
      {'heads': heads[0], 'head_dim': heads[1]}, {'embed': d_model}, rngs=rngs
    )
    self.compression = compression
    self.heads = heads
    self.sizes = dict(
      memory=mem_len, num_slots=compressed_len, rate=compression_rate
    )

  def mix_tokens(self, x, context, cache):
    """Mixes tokens; see `layers.mixer` for the contract."""
    heads, _ = self.qkv(x)
    state, tail = cache and cache.state, cache and cache.tails

    def compress(x, taps, tail, length):
      rate = self.sizes['rate']
      blocks, tail = ops.complete_blocks(x, rate, tail, length)
      compression = COMPRESSIONS[self.compression]
      return compression(blocks.astype(x.dtype), taps), tail

    layouts = ('BTD', 'CDE', 'BTD', '')
    slots, tail = sharding.local_op(compress, layouts, ('BTD', 'BTD'))(
      x,
      None if self.taps is None else value_of(self.taps, x.dtype),
      tail,
      jnp.zeros((), jnp.int32) if state is None else state.length,
    )

    def op(query, key, value, slot_key, slot_value, relative, state):
      return ops.compressive_attention(
        query,
        key,
        value,
        slot_key,
        slot_value,
        *relative,
        initial_state=state,
        **self.sizes,
      )

    def memory(leaf):
      return MEMORY[leaf.ndim]

    def lay_out(out, state):
      return 'BTNV', jax.tree.map(memory, state)

    op = sharding.local_op(op, (*['BTNH'] * 5, RELATIVE, memory), lay_out)
    entries = self.qkv.key(slots), self.qkv.value(slots)
    o, state = op(*heads, *entries, self.relative(x.dtype), state)
    return self.out(o), cache and cache.replace(state=state, tails=tail)

  def init_cache(self, batch: int, max_len: int, dtype):
    """Returns two empty memories; `max_len` does not matter."""
    state = ops.init_memory(batch, self.heads, dtype, **self.sizes)
    width = self.relative.weight.shape[0]
    tail = jnp.zeros((batch, self.sizes['rate'] - 1, width), dtype)
    return RecurrentCache(state=state, tails=tail)
