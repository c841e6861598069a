"""The kernels of attention, and which calls they serve."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from efficient_attn.ops import dispatch, masks, scores
from efficient_attn.ops.per_platform import differentiable, per_platform
from efficient_attn.ops.shapes import Scalar, Shaped, fold_scale
from efficient_attn.ops.softmax import attention_blockwise as blockwise
from efficient_attn.ops.softmax import attention_decode
from efficient_attn.ops.softmax.attention_blockwise_tile import make_options
from efficient_attn.ops.softmax.attention_kernel_terms import (
  MOST_TILES,
  learned_arrays,
  may_admit,
  to_term,
)
from efficient_attn.ops.softmax.attention_reference import attention_reference
from efficient_attn.ops.softmax.attention_tiles import (
  KernelTiles,
  device_here,
  kernel_tiles,
)
from efficient_attn.ops.softmax.hidden import may_hide
from efficient_attn.ops.softmax.stats import Stats, exp_below


def attend(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  rows: Mapping[str | None, str],
  mask: masks.Mask | None,
  bias: scores.Score | None,
  scale: Scalar | None,
  logits_soft_cap: float | None,
  sinks: Float[Array, 'N'] | None,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Attention by a kernel where `rows` names one, else blockwise.

  Args:
    query: see `attention`, as what follows.
    key: keys.
    value: values.
    rows: the kernel of each platform, see `dispatch.choose`.
    mask: mask.
    bias: bias.
    scale: scale.
    logits_soft_cap: a number, or None.
    sinks: sinks.
  """
  query, scale = fold_scale(
    query, query.shape[-1] ** -0.5 if scale is None else scale
  )
  statics = dict(scale=scale, soft_cap=logits_soft_cap, device=device_here())

  def definition(query, key, value, mask, bias, sinks):
    return attention_reference(
      query,
      key,
      value,
      mask=mask,
      bias=bias,
      scale=scale,
      logits_soft_cap=logits_soft_cap,
      sinks=sinks,
    )

  if attention_decode.serves(query, key):
    arrays = query, key, value, mask, bias, sinks
    return attention_decode.attend(definition, *arrays, rows=rows, **statics)
  options = make_options(
    mask, query.shape[1], key.shape[1], scale=scale, soft_cap=logits_soft_cap
  )
  known = _known(mask, bias)
  kernels = functools.partial(
    dispatch.kernels, KERNELS, rows, known=known, **statics
  )
  plain = functools.partial(blockwise.attend, options)

  def forward(*args):
    found = plain(*args)
    return found, found

  def backward(args, residuals, cotangents):
    found = blockwise.gradients(options, args, *residuals, cotangents)
    dq, dk, dv, _, dbias, dsinks = found
    return dq, dk, dv, _nothing(args[3]), known.only_learned(dbias), dsinks

  call = differentiable(
    functools.partial(per_platform, plain, kernels('call')),
    functools.partial(per_platform, forward, kernels('forward')),
    functools.partial(per_platform, backward, kernels('backward')),
    definition,
  )
  return call(query, key, value, mask, bias, sinks)


def request(
  query: Shaped,
  value: Shaped,
  bias: scores.Score | None,
  soft_cap: Scalar | None,
) -> dict[str, Any]:
  """What a kernel may refuse, from shapes and statics."""
  return dict(query=query, value=value, bias=bias, soft_cap=soft_cap)


def _refuses(
  *,
  query: Shaped,
  value: Shaped,
  bias: scores.Score | None,
  soft_cap: Scalar | None,
) -> str | None:
  """Why the kernel cannot serve a call, or None."""
  if attention_decode.serves(query, value):
    return attention_decode.refuses(query=query, value=value, soft_cap=soft_cap)
  T, S = query.shape[1], value.shape[1]
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f'the query is {query.dtype}, it takes bfloat16 and float32'
  for axis, size in (('H', query.shape[-1]), ('V', value.shape[-1])):
    if not 16 <= size <= 256:
      return f'{axis} = {size}, it takes 16 to 256'
  if not isinstance(soft_cap, (float, int, type(None))):
    return 'logits_soft_cap is an array, it takes a number'
  if bias is not None and bias.kernel_lacks:
    return f'scores.{type(bias).__name__} has {bias.kernel_lacks}'
  tiles = kernel_tiles(device_here(), query.dtype)
  total = math.ceil(T / tiles.rows) * math.ceil(S / tiles.cols)
  if total > MOST_TILES:
    return f'T * S = {T * S} may have {total} tiles, it takes {MOST_TILES}'
  return None


@dataclasses.dataclass(frozen=True)
class _Known:
  """What is known of a mask and a bias when a call is traced.

  Attributes:
    mask: with shapes in place of traced arrays, for its block map.
    learned: which arrays of the bias, in order, may have a gradient.
  """

  mask: masks.Mask | None
  learned: tuple[bool, ...]

  def only_learned(self, bias: scores.Score | None) -> scores.Score | None:
    """A cotangent of a bias without those of what is not learned."""
    leaves, tree = jax.tree.flatten(bias)
    return tree.unflatten(
      [
        x if learned else None
        for x, learned in zip(leaves, self.learned, strict=True)
      ]
    )


def _known(mask, bias):
  def shape(x):
    return (
      x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct(x.shape, x.dtype)
    )

  def learned(x):
    return not isinstance(x, np.ndarray) and jnp.issubdtype(
      x.dtype, jnp.inexact
    )

  return _Known(
    mask=jax.tree.map(shape, mask),
    learned=tuple(map(learned, jax.tree.leaves(bias))),
  )


def _nothing(tree):
  return jax.tree.map(lambda _: None, tree)


def _prepare(query, key, value, mask, bias, *, known, scale, soft_cap, device,
             interpret, backward):  # fmt: skip
  """The static options of a call, and the arrays of its mask and bias."""
  # Pallas takes as long to import as all of this package.
  from efficient_attn.kernels.attention.layout import Options
  from efficient_attn.kernels.attention.tiles import make_schedule

  T, S = query.shape[1], key.shape[1]
  form, learned = _in_kernel(bias, known, T, S)
  tiles = kernel_tiles(device, query.dtype)

  def block_map(rows, cols):
    if known.mask is None:
      shape = -(-T // rows), -(-S // cols)
      return np.full(shape, masks.FULL, np.int8)
    return known.mask.block_map(T, S, rows, cols)

  schedule = make_schedule(
    block_map,
    T,
    S,
    _fit(T, tiles.rows),
    _fit(S, tiles.cols),
    _span(tiles, query, value, form, backward=backward),
  )
  some = may_admit(mask, schedule)
  mask_term, mask_arrays = to_term(
    None if mask is None else mask.elementwise(T, S)
  )
  bias_term, bias_arrays = to_term(form, learned)
  options = Options(
    schedule=schedule,
    scale=scale,
    soft_cap=soft_cap,
    mask=mask_term,
    bias=bias_term,
    hides=may_hide(mask, T, S),
    vmem=tiles.vmem,
    interpret=interpret,
  )
  return options, (mask_arrays, bias_arrays, some)


def _fit(length, block):
  """Blocks of at most `block`, of whole registers in halves."""
  return min(block, -(-length // 256) * 256)


def _in_kernel(bias, known, T, S):
  """The form of a bias that kernels take, and which of its arrays learn."""
  form = None if bias is None else bias.in_kernel(T, S)
  return form, learned_arrays(form, bias, known.learned)


def _span(tiles: KernelTiles, query, value, bias, *, backward: bool) -> int:
  """How many tiles of keys stand in the VMEM at once."""
  widths = sum(-(-x.shape[-1] // 128) * 128 for x in (query, value))
  # Two buffers of each operand and result, and sums in float32.
  bytes_each = 2 * query.dtype.itemsize * (1 + backward) + 4 * backward
  bytes_each *= widths
  for x, axes in zip(
    jax.tree.leaves(bias), jax.tree.leaves(masks.letters(bias)), strict=True
  ):
    if 'T' in axes and 'S' in axes:
      bytes_each += 2 * x.dtype.itemsize * tiles.rows
    elif 'S' in axes:  # sums of lanes, of its gradient
      bytes_each += 4 * 128 * backward
  cols = min(tiles.cols, _fit(value.shape[1], tiles.cols))
  return max(1, tiles.keys // (cols * bytes_each))


def _call(query, key, value, mask, bias, sinks, **statics):
  from efficient_attn.kernels.attention.forward import forward

  options, operands = _prepare(
    query, key, value, mask, bias, backward=False, **statics
  )
  out, top, total = forward(query, key, value, sinks, operands, options=options)
  return out, Stats(top, total)


def _forward(*args, **statics):
  found = _call(*args, **statics)
  return found, found


def _backward(args, residuals, cotangents, *, known, **statics):
  from efficient_attn.kernels.attention.backward import backward

  query, key, value, mask, bias, sinks = args
  out, (top, total) = residuals
  d_out, (_, d_total) = cotangents  # top has no gradient
  options, operands = _prepare(
    query, key, value, mask, bias, backward=True, known=known, **statics
  )
  share = jnp.where(total == 0, 0, 1 / total)
  more = total * d_total
  d_q, d_k, d_v, learned = backward(
    query, key, value, out, d_out, top, share, more, operands, options=options
  )
  d_sinks = None
  if sinks is not None:
    delta = jnp.einsum(
      'btnv,btnv->btn', d_out, out, preferred_element_type=jnp.float32
    )
    p = share * exp_below(sinks.astype(jnp.float32), top)
    d_sinks = -jnp.sum(p * (delta - more), axis=(0, 1)).astype(sinks.dtype)
  d_bias = None
  if bias is not None:
    d_bias = _pull(bias, known, learned, query.shape[1], key.shape[1])
  return d_q, d_k, d_v, _nothing(mask), d_bias, d_sinks


def _pull(bias, known, found, T, S):
  """The cotangent of a bias, of those of its form in kernels.

  Args:
    bias: the bias.
    known: of the call.
    found: cotangents of what learns of the form, [B, N], or with T or S.
    T: number of queries.
    S: number of keys.
  """
  form, learned = _in_kernel(bias, known, T, S)
  leaves, tree = jax.tree.flatten(form)
  axes = jax.tree.leaves(masks.letters(form))
  found, cotangents = iter(found), []
  for x, letters, learns in zip(leaves, axes, learned, strict=True):
    if learns:
      grad = next(found)
      summed = [i for i, a in enumerate('BN') if a not in letters]
      grad = jnp.sum(grad, summed).reshape(x.shape).astype(x.dtype)
    elif jnp.issubdtype(x.dtype, jnp.inexact):
      grad = jnp.zeros(x.shape, x.dtype)
    else:
      grad = np.zeros(x.shape, jax.dtypes.float0)
    cotangents.append(grad)
  _, pull = jax.vjp(lambda bias: bias.in_kernel(T, S), bias)
  return known.only_learned(pull(tree.unflatten(cotangents))[0])


KERNELS = {
  'pallas_tpu': dispatch.Implementation(
    call=_call,
    forward=_forward,
    backward=_backward,
    platforms=('tpu',),
    refuses=_refuses,
  ),
}
