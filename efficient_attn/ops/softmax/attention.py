"""Softmax attention: the public op, its checks and its dispatch.

    o_t = sum_s p_ts v_s,   p_t = softmax_s(cap(scale q_t . k_s) + bias_ts)

(Vaswani et al. 2017), with grouped queries (Ainslie et al. 2023), a soft cap
c tanh(x / c) (Gemma 2), and learned sinks (gpt-oss). The cap comes before the
bias, so that it never pulls a large negative bias back into view. All entries
of `IMPLEMENTATIONS` share one signature; `reference` is the definition. The
kernels of `attention_kernels.KERNELS` stand beside them.
"""

import difflib
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_attn.ops import dispatch, masks, scores
from efficient_attn.ops.shapes import Scalar, Shaped
from efficient_attn.ops.softmax import attention_decode, attention_kernels
from efficient_attn.ops.softmax.attention_blockwise import attention_blockwise
from efficient_attn.ops.softmax.attention_reference import attention_reference
from efficient_attn.ops.softmax.attention_tiles import choose_tiles
from efficient_attn.ops.softmax.stats import Stats
from efficient_attn.values import ConfigError

# Each takes checked arguments and returns (out, Stats); what it cannot do it
# answers with a NotImplementedError that names what can.
IMPLEMENTATIONS = {
  'reference': attention_reference,
  'blockwise': attention_blockwise,
}

KERNELS = attention_kernels.KERNELS

# Logits per head below which the whole matrix is faster than tiles.
SMALL = 512 * 512


def attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: Float[Array, '...'] | scores.Score | None = None,
  scale: Scalar | None = None,
  logits_soft_cap: Scalar | None = None,
  sinks: Float[Array, 'N'] | None = None,
  implementation: str | Sequence[str] | None = None,
  return_lse: bool = False,
) -> (
  Float[Array, 'B T N V']
  | tuple[Float[Array, 'B T N V'], Float[Array, 'B T N']]
):
  """Softmax attention of `query` over `key` and `value`.

  Query head n reads kv head n // (N // K). A row that may attend to nothing
  returns zeros.

  Args:
    query: queries.
    key: keys, in the query's dtype.
    value: values, in the query's dtype.
    mask: an expression of `ops.masks`; None admits every pair.
    bias: an expression of `ops.scores`, or an array broadcastable to
      [B, N, T, S], added to the scaled and capped logits.
    scale: factor of the logits, H**-0.5 by default.
    logits_soft_cap: c in c tanh(logits / c).
    sinks: one logit per head that joins the softmax denominator.
    implementation: a name in `IMPLEMENTATIONS`, the name of a kernel, or 'xla'
      for the best that is not a kernel; a sequence of names, of which the
      first that can is used; or None for the best one of each platform.
    return_lse: whether to return the log of the denominator too.

  Returns:
    The output in the query's dtype and, if `return_lse`, its log denominator
    in at least float32 (sinks included; -inf for a row without keys).
  """
  out, stats = attention_with_stats(
    query,
    key,
    value,
    mask=mask,
    bias=bias,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
    implementation=implementation,
  )
  return (out, stats.lse) if return_lse else out


def attention_with_stats(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: Float[Array, '...'] | scores.Score | None = None,
  scale: Scalar | None = None,
  logits_soft_cap: Scalar | None = None,
  sinks: Float[Array, 'N'] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Returns what `attention` does, and the denominators, which `merge` takes.

  Takes the arguments of `attention`.
  """
  bias = _as_score(bias)
  _check(query, key, value, mask, bias, logits_soft_cap, sinks)
  options = dict(
    mask=mask,
    bias=bias,
    scale=scale,
    logits_soft_cap=logits_soft_cap,
    sinks=sinks,
  )
  request = attention_kernels.request(query, value, bias, logits_soft_cap)
  names, _ = _candidates(query, key, implementation)
  reasons = []
  for name in names:
    try:
      rows = _kernels(name, implementation, request)
      if rows:
        return attention_kernels.attend(query, key, value, rows=rows, **options)
      return IMPLEMENTATIONS[name](query, key, value, **options)
    except NotImplementedError as error:
      reasons.append(f'{name}: {error}')
  raise NotImplementedError('attention: ' + '; '.join(reasons))


def _kernels(name, implementation, request):
  """The kernel of each platform, where any stands for `name`."""
  if name in KERNELS:
    reason = KERNELS[name].refuses(**request)
    if reason is not None:
      raise NotImplementedError(reason)
    return {None: name}
  if implementation is not None or not _takes_kernel(name, request):
    return {}
  return dispatch.choose(KERNELS, None, op='attention', **request)


def _takes_kernel(name, request):
  """Tells whether a kernel, where there is one, is better than `name`."""
  query, value = request['query'], request['value']
  return name == 'blockwise' or (
    attention_decode.serves(query, value)
    and value.shape[1] >= attention_decode.LEAST_KEYS
  )


def explain_attention(
  query: Float[Shaped, 'B T N H'],
  key: Float[Shaped, 'B S K H'],
  value: Float[Shaped, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: Float[Array, '...'] | scores.Score | None = None,
  scale: Scalar | None = None,
  logits_soft_cap: Scalar | None = None,
  sinks: Float[Array, 'N'] | None = None,
  implementation: str | Sequence[str] | None = None,
) -> str:
  """Says which implementation `attention` uses for these arguments, and why.

  Takes the arguments of `attention`; shapes are enough, nothing is computed.
  """
  bias = _as_score(bias)
  _check(query, key, value, mask, bias, logits_soft_cap, sinks)
  request = attention_kernels.request(query, value, bias, logits_soft_cap)
  names, why = _candidates(query, key, implementation)
  refused = []
  for name in names:
    try:
      rows = _kernels(name, implementation, request)
      if name in IMPLEMENTATIONS:
        jax.eval_shape(
          functools.partial(
            IMPLEMENTATIONS[name],
            mask=mask,
            bias=bias,
            scale=scale,
            logits_soft_cap=logits_soft_cap,
            sinks=sinks,
          ),
          query,
          key,
          value,
        )
    except NotImplementedError as error:
      refused.append(f'; not {name}: {error}')
      continue
    answer = f'{name}: {why}' + ''.join(refused)
    if name == 'blockwise':
      answer += _tiles(query, key, mask)
    if implementation is None and _takes_kernel(name, request):
      answer += ''.join(
        f'; on {platform} {kernel}' for platform, kernel in rows.items()
      )
      answer += ''.join(
        f'; not {kernel}: {reason}'
        for kernel, row in KERNELS.items()
        if (reason := row.refuses(**request)) is not None
      )
    return answer
  return 'none' + ''.join(refused)


def _tiles(query, key, mask):
  T, S = query.shape[1], key.shape[1]
  block_q, block_k, tiles = choose_tiles(mask, T, S)
  total = -(-T // block_q) * -(-S // block_k)
  return f'; visits {len(tiles)} of {total} tiles of {block_q} x {block_k}'


def _candidates(query, key, implementation):
  """The names to try in order, and the reason."""
  if implementation in (None, dispatch.XLA):
    T, S = query.shape[1], key.shape[1]
    if T == 1:
      return ('reference',), 'one query row (T = 1) has nothing to tile'
    if attention_decode.serves(query, key):
      return ('reference',), f'T = {T} query rows are too few to tile'
    if T * S <= SMALL:
      return ('reference',), f'T * S = {T * S} logits per head fit at once'
    return ('blockwise',), f'T * S = {T * S} logits per head are over {SMALL}'
  names = implementation
  if isinstance(names, str):
    names = (names,)
  if not names:
    raise ConfigError('implementation is empty; name one, or pass None.')
  known = (*IMPLEMENTATIONS, *KERNELS, dispatch.XLA)
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0)
      raise ConfigError(
        f'implementation {name!r} does not exist; did you mean {near[0]!r}?'
        f' There are {", ".join(known)}.'
      )
  plain, _ = _candidates(query, key, None)
  names = [plain[0] if name == dispatch.XLA else name for name in names]
  return tuple(names), 'the implementation asked for'


def _as_score(bias):
  if bias is None or isinstance(bias, scores.Score):
    return bias
  return scores.Dense(jnp.asarray(bias))


def _check(query, key, value, mask, bias, logits_soft_cap, sinks):
  """Raises a ValueError that names the axis, its size and the remedy."""
  arrays = {'query': query, 'key': key, 'value': value}
  layouts = {'query': 'BTNH', 'key': 'BSKH', 'value': 'BSKV'}
  sizes, owners = {}, {}
  for name, array in arrays.items():
    layout = layouts[name]
    shown = f'{name} of shape {array.shape}'
    if array.ndim != 4:
      raise ValueError(
        f'{shown} has {array.ndim} axes; it must be [{", ".join(layout)}].'
      )
    for axis, size in zip(layout, array.shape, strict=True):
      if size == 0:
        raise ValueError(f'{shown}: axis {axis} is 0; it must be at least 1.')
      if sizes.setdefault(axis, size) != size:
        raise ValueError(
          f'{shown}: axis {axis} is {size} but {sizes[axis]} in'
          f' {owners[axis]}; they must be equal.'
        )
      owners.setdefault(axis, name)
    if not jnp.issubdtype(array.dtype, jnp.floating) or (
      array.dtype.itemsize == 1
    ):
      raise ValueError(
        f'{name} has dtype {array.dtype}; cast it to a floating type of 16 bits'
        ' or more.'
      )
    if array.dtype != query.dtype:
      raise ValueError(
        f'{name} has dtype {array.dtype} but query has {query.dtype}; cast'
        ' them to one dtype.'
      )
  if sizes['N'] % sizes['K']:
    raise ValueError(
      f'N = {sizes["N"]} query heads cannot share K = {sizes["K"]} kv heads;'
      ' N must be a multiple of K.'
    )
  if sinks is not None and sinks.shape != (sizes['N'],):
    raise ConfigError(
      f'sinks of shape {sinks.shape} must be [N] = ({sizes["N"]},), one logit'
      ' per query head.'
    )
  if isinstance(logits_soft_cap, (float, int)) and logits_soft_cap <= 0:
    raise ConfigError(
      f'logits_soft_cap is {logits_soft_cap}; it must be positive, or None.'
    )
  if mask is not None and not isinstance(mask, masks.Mask):
    raise ValueError(
      f'mask is a {type(mask).__name__}; pass an expression of ops.masks, an'
      ' array as masks.Dense(array).'
    )
  full = tuple(sizes[axis] for axis in 'BNTS')
  for name, part in (('mask', mask), ('bias', bias)):
    if part is None:
      continue
    shape = jax.eval_shape(lambda part=part: part.dense(*full[2:])).shape
    for axis, size, wanted in zip('BNTS', shape, full, strict=True):
      if size not in (1, wanted):
        raise ValueError(
          f'{name} of shape {shape}: axis {axis} is {size} but {axis} is'
          f' {wanted} in the query and key; it must be 1 or {wanted}.'
        )
