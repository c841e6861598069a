"""The kernel of attention for few queries, a decoder's, over many keys.

Its time is that of reading keys and values once. A mask and a bias of few
queries are small beside a cache, so that the kernel takes them as numbers that
are added to the logits, whatever their expression; keys that no query sees,
such as the room behind a cursor, are not read. Derivatives are those of the
definition.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import dispatch, masks
from efficient_attn.ops.per_platform import per_platform
from efficient_attn.ops.shapes import Scalar, Shaped, fold_scale
from efficient_attn.ops.softmax.attention_tiles import device_here, kernel_tiles
from efficient_attn.ops.softmax.stats import Stats

# More queries are left to tiles, and the logits of fewer keys to XLA.
MOST_QUERIES = 8
LEAST_KEYS = 512
# Rows that a product has before its logits take longer than its keys.
MOST_ROWS = 256
# Bytes of a piece of keys: long enough a copy to hide what a program costs.
PIECE = 2**20
LANES = 128


def serves(query: Shaped, key: Shaped) -> bool:
  """Tells the calls of a decoder: few queries over more keys."""
  T, S = query.shape[1], key.shape[1]
  return T == 1 or (T <= MOST_QUERIES and S >= LEAST_KEYS)


def attend(
  definition: Callable,
  *arrays: Any,
  rows: Mapping[str | None, str],
  **statics: Any,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Attention by a kernel where `rows` names one, else the definition.

  Args:
    definition: of `arrays`.
    *arrays: query, key, value, mask, bias and sinks of `attention`.
    rows: the kernel of each platform, see `dispatch.choose`.
    **statics: what a kernel takes besides, its scale folded.
  """
  kernels = dispatch.kernels(KERNELS, rows, 'call', **statics)
  return per_platform(definition, kernels, *arrays)


def attend_pages(
  definition: Any,
  query: Float[Array, 'B T N H'],
  key_pages: Float[Array, 'P page K H'],
  value_pages: Float[Array, 'P page K V'],
  block_table: Int[Array, 'B M'],
  lengths: Int[Array, 'B'],
  *,
  rows: Mapping[str | None, str],
  scale: Scalar | None,
  logits_soft_cap: float | None,
) -> Float[Array, 'B T N V']:
  """Attention over pages by a kernel where `rows` names one.

  Args:
    definition: maps the arrays, and the scale and soft cap by keyword, to the
      output.
    query: see `paged_attention`, as what follows.
    key_pages: keys.
    value_pages: values.
    block_table: table.
    lengths: lengths.
    rows: the kernel of each platform, see `dispatch.choose`.
    scale: scale.
    logits_soft_cap: a number, or None.
  """
  query, scale = fold_scale(
    query, query.shape[-1] ** -0.5 if scale is None else scale
  )
  plain = functools.partial(
    definition, scale=scale, logits_soft_cap=logits_soft_cap
  )
  kernels = dispatch.kernels(
    PAGED,
    rows,
    'call',
    scale=scale,
    soft_cap=logits_soft_cap,
    device=device_here(),
  )
  arrays = query, key_pages, value_pages, block_table, lengths
  return per_platform(plain, kernels, *arrays)


def refuses(
  *, query: Shaped, value: Shaped, soft_cap: Scalar | None
) -> str | None:
  """Returns why the kernel cannot serve a call, or None.

  Args:
    query: [B, T, N, H].
    value: [B, S, K, V], or pages of it.
    soft_cap: of the logits.
  """
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f'the query is {query.dtype}, it takes bfloat16 and float32'
  T, N, H = query.shape[1:]
  K, V = value.shape[2:]
  for axis, size in (('H', H), ('V', V)):
    if not 16 <= size <= 1024:
      return f'{axis} = {size}, it takes 16 to 1024'
  if not isinstance(soft_cap, (float, int, type(None))):
    return 'logits_soft_cap is an array, it takes a number'
  if T * N > MOST_ROWS:
    return f'T * N = {T * N} query rows, it takes {MOST_ROWS}'
  # Two buffers each of the least that keys and values come in.
  least = 4 * _bytes(query, value) * _tile(K, query.dtype)
  if least > kernel_tiles(device_here(), query.dtype).vmem * 3 // 4:
    return f'K * H = {K * H}: two pieces of keys and values fill the VMEM'
  return None


def _refuses_pages(*, pages: Shaped, **request: Any) -> str | None:
  page, K = pages.shape[1:3]
  if LANES % page and page % LANES:
    return f'page = {page}, it takes multiples and divisors of {LANES}'
  if page * K % 16:
    return f'page * K = {page * K} rows, it takes multiples of 16'
  return refuses(value=pages, **request)


def _bytes(query, value):
  """Of a key or value of all heads, as they stand in the VMEM."""
  width = max(query.shape[-1], value.shape[-1])
  return -(-width // LANES) * LANES * value.shape[2] * query.dtype.itemsize


def _tile(heads, dtype):
  """Keys of one product: about 1024 rows, with all heads."""
  return LANES * max(1, 16 // (heads * jnp.dtype(dtype).itemsize))


def _call(
  query, key, value, mask, bias, sinks, *, scale, soft_cap, device, interpret
):
  # Pallas takes as long to import as all of this package.
  from efficient_attn.kernels.attention.decode import Pieces, decode

  T, S = query.shape[1], key.shape[1]
  tile = _tile(key.shape[2], query.dtype)
  short = [(0, 0), (0, max(tile - S, 0)), (0, 0), (0, 0)]
  key, value = jnp.pad(key, short), jnp.pad(value, short)
  keys = min(PIECE // _bytes(query, value), key.shape[1]) // tile * tile
  keys = max(keys, tile)
  pieces = Pieces(
    keys=keys,
    tile=tile,
    count=1,
    paged=False,
    scale=scale,
    soft_cap=soft_cap,
    vmem=kernel_tiles(device, query.dtype).vmem,
    interpret=interpret,
  )
  added, kinds = _added(mask, bias, T, S, keys, 1)
  kinds = jnp.broadcast_to(kinds, (len(query), kinds.shape[1]))
  out, *stats = decode(
    query, key, value, added, sinks, kinds, None, pieces=pieces
  )
  return out, Stats(*stats)


def _call_pages(
  query, key_pages, value_pages, block_table, lengths,
  *, scale, soft_cap, device, interpret,
):  # fmt: skip
  from efficient_attn.kernels.attention.decode import Pieces, decode

  T, (P, page, K, _) = query.shape[1], key_pages.shape
  tile = _tile(K, query.dtype)
  count = max(tile // page, 1)
  pieces = Pieces(
    keys=page,
    tile=page if count > 1 else math.gcd(page, tile),
    count=count,
    paged=True,
    scale=scale,
    soft_cap=soft_cap,
    vmem=kernel_tiles(device, query.dtype).vmem,
    interpret=interpret,
  )
  mask = masks.Causal(lengths - T)
  S = block_table.shape[1] * page
  added, kinds = _added(mask, None, T, S, page, count)
  more = kinds.shape[1] - block_table.shape[1]
  table = jnp.pad(block_table.clip(0, P - 1), [(0, 0), (0, more)])
  out, *_ = decode(
    query, key_pages, value_pages, added, None, kinds, table, pieces=pieces
  )
  return out


def _added(mask, bias, T, S, keys, count):
  """Returns what logits gain, [#B, #N, T, S'], and the kinds of all pieces.

  S' is whole programs of `count` pieces of as many keys.
  """
  from efficient_attn.kernels.attention.decode import ALL, HIDDEN, NOTHING, SOME

  added = jnp.zeros((1, 1, T, S), jnp.bfloat16)
  if bias is not None:
    added = bias.dense(T, S).astype(jnp.float32)
  if mask is not None:
    added = jnp.where(mask.dense(T, S), added, -jnp.inf)
  more = -S % (keys * count)
  added = jnp.pad(added, [(0, 0)] * 3 + [(0, more)], constant_values=HIDDEN)
  added = jnp.maximum(added, HIDDEN)
  seen = jnp.any(added > HIDDEN / 2, axis=(1, 2)).reshape(len(added), -1, keys)
  kinds = jnp.where(seen.all(2), ALL, jnp.where(seen.any(2), SOME, NOTHING))
  return added, kinds


def _row(call, refuses):
  return dispatch.Implementation(
    call=call,
    forward=None,
    backward=None,
    platforms=('tpu',),
    refuses=refuses,
  )


KERNELS = {'pallas_tpu': _row(_call, refuses)}
PAGED = {'pallas_tpu': _row(_call_pages, _refuses_pages)}
