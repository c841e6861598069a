"""The stack of blocks: patterns of mixers and ffns repeated over depth.

With `scan_layers` the repetitions of the patterns are one `jax.lax.scan`, so
that compile time does not grow with depth; parameters and caches then carry a
leading axis of repetitions. First layers with ffns of their own are unrolled in
front of it, and layers left over after the last full repetition behind. A
`tied` stack has the parameters of one repetition, which runs again and again.

Layers of one repetition may share keys and values: see `share`.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError, ModelConfig, choose
from efficient_attn.layers import capture
from efficient_attn.layers.block import Block, row_of
from efficient_attn.layers.context import Context
from efficient_attn.layers.ffns import FFNS, read_ffn_options
from efficient_attn.layers.mixer import Penalized, SharesKeys
from efficient_attn.layers.mixers import MIXERS, choose_mixer, read_options
from efficient_attn.ops.per_platform import KEPT

_policies = jax.checkpoint_policies
_kernels = _policies.save_only_these_names(KEPT)

# What a block keeps for its backward pass; the rest is computed again. All but
# 'full' keep what kernels give, which are most of the time of a long sequence.
REMAT_POLICIES = {
  'none': _policies.everything_saveable,
  'full': _policies.nothing_saveable,
  'kernels': _kernels,
  'dots': _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable, _kernels
  ),
  'all_dots': _policies.save_from_both_policies(
    _policies.dots_saveable, _kernels
  ),
}


class Period(nnx.Module):
  """One repetition of the patterns, each layer a mixer and an ffn by name."""

  def __init__(
    self,
    config: ModelConfig,
    layers: Sequence[tuple[str, str]],
    causal: bool,
    *,
    cross: bool = False,
    rngs: nnx.Rngs,
  ):
    self.blocks = nnx.List(
      Block(config, mixer, causal, ffn=ffn, cross=cross, rngs=rngs)
      for mixer, ffn in layers
    )
    share(tuple(mixer for mixer, _ in layers), self.blocks)
    self.policy = None
    if config.remat != 'none':
      self.policy = choose('model.remat', config.remat, REMAT_POLICIES)

  def __call__(self, x, cache, key, *, context):
    """Runs the blocks; `cache` and `key` hold one entry each, or None."""
    cache = [None] * len(self.blocks) if cache is None else list(cache)
    shared = {}
    for i, block in enumerate(self.blocks):
      block_key = None if key is None else jax.random.fold_in(key, i)

      def run(block, x, cache, key, shared):
        return block(x, context, cache, key, shared)

      if self.policy is not None:
        keep = functools.partial(jax.checkpoint, policy=self.policy)
        run = capture.passing(keep, run)
      x, cache[i], shared = run(block, x, cache[i], block_key, shared)
    return x, cache

  def init_cache(self, *args):
    """Returns one cache a block."""
    return [block.init_cache(*args) for block in self.blocks]


def share(pattern, blocks) -> None:
  """Lets the attention layers of a period hand their keys and values on.

  Only where a mixer has none (its option `shared_kv`) and reads those of the
  nearest attention layer before it, if that `SharesKeys`.
  """
  mixers = [block.mixer for block in blocks]
  if not any(getattr(mixer, 'shared_kv', False) for mixer in mixers):
    return
  widths = None
  for name, block in zip(pattern, blocks, strict=True):
    reads = getattr(block.mixer, 'shared_kv', False)
    block.shares = isinstance(block.mixer, SharesKeys)
    block.shares = block.shares and block.mixer.shares_keys
    if not reads:
      widths = block.mixer.kv_heads if block.shares else widths
    elif not block.shares:
      raise ConfigError(
        f'model.mixers.{name}.shared_kv=True is not possible for '
        f'{row_of(name)}, whose cache is not one of all keys and values'
      )
    elif widths is None:
      raise ConfigError(
        f'model.pattern={pattern}: {name} has no keys of its own '
        '(shared_kv=True) and no attention layer before it to share those of'
      )
    elif widths != block.mixer.kv_heads:
      raise ConfigError(
        f'model.pattern={pattern}: {name} expects (num_kv_heads, head_dim)='
        f'{block.mixer.kv_heads} but shares the keys of a layer with {widths}; '
        'give both the same options'
      )


class Stack(nnx.Module):
  """`config.num_layers` blocks, those of `config.layers` in order."""

  def __init__(
    self,
    config: ModelConfig,
    causal: bool,
    *,
    cross: bool = False,
    tied: bool = False,
    rngs: nnx.Rngs,
  ):
    for name, options in config.mixers.items():  # the pattern has some of them
      choose_mixer('model.mixers', row_of(name))
      read_options(row_of(name), options, f'model.mixers.{name}')
    for name in config.residuals:
      choose('model.residuals', row_of(name), MIXERS | FFNS)
    for key in ('ffn_pattern', 'first_ffns', 'ffns'):
      for name in getattr(config, key):
        choose(f'model.{key}', row_of(name), FFNS)
    for name, options in config.ffns.items():
      read_ffn_options(row_of(name), options, f'model.ffns.{name}')
    lead, period = len(config.first_ffns), config.period
    self.repeats, rest = divmod(config.num_layers - lead, period)
    self.tied = tied
    self.scan = config.scan_layers and self.repeats > 1 and not tied
    make = functools.partial(Period, config, causal=causal, cross=cross)
    first, layers = config.layers[:lead], config.layers[lead:]
    self.first = make(first, rngs=rngs) if lead else None
    if self.scan:
      keys = jax.random.split(rngs.params(), self.repeats)
      self.periods = jax.vmap(
        lambda key: make(layers[:period], rngs=nnx.Rngs(key))
      )(keys)
    else:
      self.periods = nnx.List(
        make(layers[:period], rngs=rngs)
        for _ in range(1 if tied else self.repeats)
      )
    self.rest = make(layers[:rest], rngs=rngs) if rest else None

  def __call__(self, x, context: Context | None = None, cache=None, key=None):
    """Maps x [B, T, D] to the same shape, and the cache to the next one."""
    context = Context() if context is None else context
    x = context.without_padding(x)
    run = functools.partial(Period.__call__, context=context)
    first, periods, rest = (None,) * 3 if cache is None else cache
    if self.first is not None:
      own = None
      if key is not None:
        key, own = jax.random.split(key)
      x, first = run(self.first, x, first, own)
    keys = None if key is None else jax.random.split(key, self.repeats + 1)
    if self.scan or self.tied:

      def body(x, inputs):
        period = self.periods[0] if self.tied else inputs[0]
        return run(period, x, *inputs[1:])

      scan_keys = None if keys is None else keys[:-1]
      each = jnp.arange(self.repeats) if self.tied else self.periods
      x, periods = capture.scan(body, x, (each, periods, scan_keys))
    else:
      periods = [None] * self.repeats if periods is None else list(periods)
      for i, period in enumerate(self.periods):
        period_key = None if keys is None else keys[i]
        x, periods[i] = run(period, x, periods[i], period_key)
    if self.rest is not None:
      x, rest = run(self.rest, x, rest, None if keys is None else keys[-1])
    return x, None if cache is None else (first, periods, rest)

  def blocks(self):
    """Iterates over the blocks; those of a scan are one, of stacked arrays."""
    periods = [self.periods] if self.scan else list(self.periods)
    for period in (self.first, *periods, self.rest):
      if period is not None:
        yield from period.blocks

  def layers(self):
    """Iterates over all layers in order, each a block of arrays of its own.

    Layers that `share` keys hand them on as `shared`, see `Block.__call__`.
    """
    periods = self.periods
    if self.scan:
      periods = (
        jax.tree.map(lambda x, r=r: x[r], self.periods)
        for r in range(self.repeats)
      )
    if self.tied:
      periods = [self.periods[0]] * self.repeats
    for period in itertools.chain([self.first], periods, [self.rest]):
      if period is not None:
        yield from period.blocks

  def penalty(self):
    """What the mixers add to the mean objective of a step, a scalar."""
    mixers = (b.mixer for b in self.blocks() if b.penalized)
    modules = (m for mixer in mixers for _, m in nnx.iter_modules(mixer))
    return sum(m.penalty() for m in modules if isinstance(m, Penalized))

  def init_cache(
    self, batch: int, max_len: int, dtype, context: Context | None = None
  ):
    """Returns the caches of all blocks, stacked where the blocks are."""
    args = (batch, max_len, dtype, context)
    if self.scan:
      periods = jax.vmap(lambda p: p.init_cache(*args))(self.periods)
    else:
      periods = [period.init_cache(*args) for period in self.periods]
    first, rest = (x and x.init_cache(*args) for x in (self.first, self.rest))
    return first, periods, rest
