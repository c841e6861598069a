"""Kernels of other libraries, as functions of the arrays of our ops.

A library that is not installed leaves its row empty, with the command that
fills it: some need another Python or jax than this environment has.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp


class Peer(NamedTuple):
  """A kernel of another library.

  Attributes:
    build: imports it for a device, and returns a function of the op's arrays.
    module: what must be installed.
    install: the command that installs it, with what it needs.
    chips: on which it runs; none are all.
    conditions: of kernels by name, see `bundles.read_kernel`.
  """

  build: Callable
  module: str
  install: str = ''
  chips: tuple[str, ...] = ()
  conditions: dict[str, tuple[float, ...]] = {}

  def missing(self, topology: str) -> str | None:
    """Returns why it cannot be measured here."""
    if self.chips and not topology.startswith(self.chips):
      return f'only for {", ".join(self.chips)}'
    if importlib.util.find_spec(self.module) is None:
      return f'not installed: {self.install}'
    return None


def _splash(mask, block):
  """The splash kernels of jax: forward and one fused backward pass."""

  def build(device):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
      splash_attention_mask as of,
    )

    def call(q, k, v):
      length, heads = q.shape[1:3]
      run = kernel.make_splash_mha(
        of.MultiHeadMask([mask(of, length)] * heads),
        block_sizes=kernel.BlockSizes(
          block_q=block, block_kv=block, block_kv_compute=block,
          block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
          use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
      )  # fmt: skip
      scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
      by_head = [jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v)]
      return jnp.swapaxes(jax.vmap(run)(*by_head), 1, 2)

    return call

  return build


def _deltanet(name):
  """A kernel of deltanet-tpu."""

  def build(device):
    import deltanet_tpu

    def call(q, k, v, log_decay=None, beta=None):
      rest = [x for x in (log_decay, beta) if x is not None]
      # It interprets its kernels unless the process has a TPU.
      with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
        return getattr(deltanet_tpu, name)(q, k, v, *rest)

    return call

  return build


def _tokamax_kda(device):
  """Kimi delta attention of tokamax; it asks for the kind of the device."""
  from tokamax._src.ops.kda import api

  def call(q, k, v, log_decay, beta):
    by_head = [jnp.moveaxis(x, 2, 0) for x in (q, k, v, log_decay, beta)]
    with jax.default_device(device):
      out, _ = api.kimi_delta_attention(*by_head, implementation='mosaic')
    return jnp.moveaxis(out, 0, 2)

  return call


JAX = 'jax.experimental.pallas'
# A block of queries begins, meets pairs, and ends: of 4 x 4 blocks 10 hold
# pairs, in a window 21 of 8 x 3, and 21 of 8 x 8 for the keys.
SPLASH_CAUSAL = Peer(
  _splash(lambda of, length: of.CausalMask((length, length)), 1024),
  JAX,
  conditions={
    'splash_mha_fwd_residuals': (1 / 4, 10 / 16, 1 / 4),
    'splash_mha_fwd_no_residuals': (1 / 4, 10 / 16, 1 / 4),
    'splash_mha_dkv_no_residuals': (1 / 4, 10 / 16, 1 / 4),
  },
)
SPLASH_WINDOW = Peer(
  _splash(lambda of, length: of.LocalMask((length, length), (1023, 0), 0), 512),
  JAX,
  conditions={
    'splash_mha_fwd_residuals': (1 / 3, 21 / 24, 1 / 3),
    'splash_mha_fwd_no_residuals': (1 / 3, 21 / 24, 1 / 3),
    'splash_mha_dkv_no_residuals': (1 / 8, 21 / 64, 1 / 8),
  },
)

# Both need Python 3.12, and jax 0.11.
NEW = "Python 3.12, pip install 'jax[tpu]==0.11.2'"
TOKAMAX_KDA = Peer(_tokamax_kda, 'tokamax', f'{NEW} tokamax==0.0.17', ('v6e',))
DELTANET = {
  name: Peer(_deltanet(name), 'deltanet_tpu', f'{NEW} deltanet-tpu==0.3.0')
  for name in ('chunk_gla', 'chunk_delta_rule', 'chunk_gdn', 'chunk_kda')
}
