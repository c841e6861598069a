"""The kernels of recurrences of matrices, and which calls they serve."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from efficient_attn.ops import chunks, dispatch, shapes
from efficient_attn.ops.recurrent import by_kernel, chunk_states, forms, gates


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Array,
  *,
  op: str,
  segment_ids: Int[Array, 'B T'] | None,
  form: str | None,
  chunk_size: int,
  inclusive: bool,
  implementation: str | Sequence[str] | None,
  scale: float,
  dtype: jnp.dtype | None,
) -> tuple[Array, Array]:
  """Does what `forms.recur` does, by a kernel where one serves the call.

  Args:
    step: see `forms.recur`.
    chunk: see `forms.recur`.
    tokens: ([q, k, ...], values, gate), see `matrix_recurrence.recur`; the
      gate as it is, without a floor.
    state: [B, K, G, H, V], before token 0.
    op: of KERNELS.
    segment_ids: see `forms.recur`.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    inclusive: whether a token reads itself.
    implementation: see `dispatch.choose`.
    scale: factor on the output.
    dtype: of the output; None is that of the state.

  Returns:
    out: [B, T, K, G, V] and the state after the last token.
  """
  dtype = jnp.dtype(dtype or state.dtype)
  (q, *_), (v, *_), gate = tokens
  rows = dispatch.choose(
    KERNELS[op],
    implementation,
    op=op,
    **_request(
      q,
      v,
      dtype=state.dtype,
      per_channel=_per_channel(gate),
      inclusive=inclusive,
      form=form,
      chunk_size=chunk_size,
    ),
  )
  options = dict(
    step=step,
    chunk=chunk,
    form=form,
    chunk_size=chunk_size,
    scale=scale,
    dtype=dtype,
  )
  if rows and dispatch.XLA_PARALLEL not in rows.values():
    return _by_kernel(
      tokens,
      state,
      segment_ids,
      op=op,
      rows=tuple(rows.items()),
      inclusive=inclusive,
      **options,
    )
  out, last = forms.recur(
    step,
    chunk,
    _floored(tokens),
    state,
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
    implementation=rows.get(None),
    dtype=_operand(tokens, state),
  )
  return (out * scale).astype(dtype), last


def _floored(tokens):
  """For sums of gates, which the kernels do without, or mask."""
  keys, values, gate = tokens
  return keys, values, None if gate is None else gates.floored(gate)


# Compiled, so that calls of equal shapes are traced once.
@functools.partial(
  jax.jit,
  static_argnames=(
    'step', 'chunk', 'op', 'form', 'chunk_size', 'scale', 'dtype', 'rows',
    'inclusive',
  ),
)  # fmt: skip
def _by_kernel(
  tokens,
  state,
  segment_ids,
  *,
  step,
  chunk,
  op,
  form,
  chunk_size,
  scale,
  dtype,
  rows,
  inclusive,
):
  operand = _operand(tokens, state)
  kernels = functools.partial(
    dispatch.kernels,
    KERNELS[op],
    dict(rows),
    scale=scale,
    operand=operand,
    inclusive=inclusive,
  )
  *xla, definition = forms.passes(
    step,
    chunk,
    length=tokens[0][0].shape[1],
    form=form,
    chunk_size=chunk_size,
    span=by_kernel.SPAN,
    dtype=operand,
  )
  transposed = _by_channel(op, tokens, inclusive)

  def as_saved(states):
    # The kernel of a channel gate keeps them transposed.
    return jnp.swapaxes(states, -1, -2) if transposed else states

  def call(function):
    def run(tokens, state, segment_ids):
      out, last = function(_floored(tokens), state, segment_ids)
      return (out * scale).astype(dtype), last

    return run

  def forward(function):
    def run(tokens, state, segment_ids):
      (out, last), states = function(_floored(tokens), state, segment_ids)
      return ((out * scale).astype(dtype), last), as_saved(states)

    return run

  def backward(function):
    def run(args, states, cotangents):
      tokens, state, segment_ids = args
      out, last = cotangents
      out = out.astype(last.dtype) * scale
      floored, pull = jax.vjp(_floored, tokens)
      found, first, _ = function(
        (floored, state, segment_ids), as_saved(states), (out, last)
      )
      return pull(found)[0], first, None

    return run

  function = by_kernel.differentiated(
    xla,
    definition,
    forms.Passes(call, forward, backward),
    (
      kernels('call', dtype=dtype),
      kernels('forward', dtype=dtype),
      kernels('backward'),
    ),
  )
  return function(tokens, state, segment_ids)


def _operand(tokens, state):
  keys, (v, *_), _ = tokens
  return shapes.operand(state.dtype, *keys, v)


def _by_channel(op, tokens, inclusive):
  """Tells calls of the kernel with a gate per channel from the others.

  A gate that is the same for all channels is repeated for what the kernels of
  one per head have not.
  """
  _, values, gate = tokens
  erases = len(values) > 2 and values[2] is not None
  return op == 'dplr' or _per_channel(gate) or erases or not inclusive


def _per_channel(gate):
  return gate is not None and gate.shape[-1] > 1


def explain(
  op: str,
  implementation: str | Sequence[str] | None,
  q: Any,
  v: Any,
  *others: Any,
  log_decay: Any,
  read: str = 'inclusive',
  **options: Any,
) -> str:
  """Says which kernel of an op each platform takes, and why not another.

  Args:
    op: of KERNELS.
    implementation: see `dispatch.choose`.
    q: [B, T, K, H].
    v: [B, T, N, V].
    *others: the other arrays of the call; shapes are enough.
    log_decay: of the call, or None.
    read: of the call.
    **options: form and chunk_size.
  """
  dtype = shapes.accumulator(q, v, others, log_decay)
  return dispatch.explain(
    KERNELS[op],
    implementation,
    op=op,
    **_request(
      q,
      v,
      dtype=dtype,
      per_channel=log_decay is not None and len(log_decay.shape) == 4,
      inclusive=read == 'inclusive',
      **options,
    ),
  )


def _request(q, v, **options):
  """Returns what `_refuses` reads, from shapes and statics."""
  return dict(
    length=q.shape[1], channels=q.shape[-1], width=v.shape[-1], **options
  )


def _refuses(
  *,
  channels: int,
  width: int,
  per_channel: bool,
  inclusive: bool,
  **options: Any,
) -> str | None:
  """Returns why a kernel cannot serve a call, or None."""
  if reason := by_kernel.refuses(**options):
    return reason
  for axis, size in (('H', channels), ('V', width)):
    if not 16 <= size <= 256:
      return f'{axis} = {size}, it takes 16 to 256'
  if not (inclusive or per_channel):
    return "read = 'exclusive', it needs a gate per channel for that"
  return None


def _dplr_refuses(*, per_channel, **options):
  if not per_channel:
    return 'log_decay is not per channel, it needs such a gate'
  return _refuses(per_channel=per_channel, **options)


def _kernel(op, tokens, inclusive):
  """The kernel of a call, and what else it takes."""
  # Pallas takes as long to import as all of this package.
  from efficient_attn.kernels.additive import channel_gate as additive_channel
  from efficient_attn.kernels.additive import scalar_gate as additive_scalar
  from efficient_attn.kernels.delta import channel_gate as delta_channel
  from efficient_attn.kernels.delta import dplr
  from efficient_attn.kernels.delta import scalar_gate as delta_scalar

  if not _by_channel(op, tokens, inclusive):
    scalar = {'linear_attention': additive_scalar, 'delta_rule': delta_scalar}
    return scalar[op], {}
  channel = {
    'linear_attention': additive_channel,
    'delta_rule': delta_channel,
    'dplr': dplr,
  }
  return channel[op], {'inclusive': inclusive}


def _arguments(op, tokens, segment_ids, inclusive):
  """Returns keys, values, the gate and starts, as a kernel takes them."""
  keys, values, gate = tokens
  starts = None
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)
  if _by_channel(op, tokens, inclusive):
    gate = _of_channels(gate, tokens)
  else:
    values = values[:2]  # without what erases
  return *(x[:, :, :, 0] for x in keys), *values, gate, starts


def _of_channels(gate, tokens):
  """Any gate as [B | 1, T, K, G, H]."""
  (q, *_), (v, *_), _ = tokens
  if gate is None:
    gate = jnp.zeros((1, *v.shape[1:-1], 1), jnp.float32)
  return jnp.broadcast_to(gate, (*gate.shape[:-1], q.shape[-1]))


def _call(op, tokens, state, segment_ids, *, inclusive, save=False, **statics):
  *arrays, starts = _arguments(op, tokens, segment_ids, inclusive)
  kernel, more = _kernel(op, tokens, inclusive)
  return kernel.forward(*arrays, state, starts, save=save, **statics, **more)


def _forward(op, *args, **statics):
  out, last, states = _call(op, *args, save=True, **statics)
  return (out, last), states


def _backward(op, args, states, cotangents, *, inclusive, **statics):
  tokens, _, segment_ids = args
  keys, values, gate = tokens
  *arrays, starts = _arguments(op, tokens, segment_ids, inclusive)
  kernel, more = _kernel(op, tokens, inclusive)
  *found, d_gate, first = kernel.backward(
    *arrays, starts, states, *cotangents, **statics, **more
  )
  d_keys = [x[:, :, :, None] for x in found[: len(keys)]]
  d_values = found[len(keys) :]
  d_values += [None] * (len(values) - len(d_values))
  if gate is None:
    d_gate = None
  elif gate.shape != d_gate.shape:
    d_gate = jnp.sum(d_gate, -1, keepdims=True)
  return (d_keys, d_values, d_gate), first, None


def _implementation(op, refuses):
  return dispatch.Implementation(
    *(functools.partial(f, op) for f in (_call, _forward, _backward)),
    platforms=('tpu',),
    refuses=refuses,
  )


KERNELS = {
  op: {'pallas_tpu': _implementation(op, refuses)}
  for op, refuses in (
    ('linear_attention', _refuses),
    ('delta_rule', _refuses),
    ('dplr', _dplr_refuses),
  )
}
