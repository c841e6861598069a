"""The kernels of recurrences of matrices, and which calls they serve."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from efficient_attn.ops import chunks, dispatch, shapes
from efficient_attn.ops.recurrent import chunk_states, forms, gates

SPAN = 128  # tokens between two states that the forward pass keeps


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
    tokens: ([q, k], values, gate), see `matrix_recurrence.recur`; the gate as
      it is, without a floor.
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
  (q, _), (v, *others), gate = tokens
  rows = dispatch.choose(
    KERNELS[op],
    implementation,
    op=op,
    **request(
      q,
      v,
      dtype=state.dtype,
      per_channel=_per_channel(gate),
      form=form,
      chunk_size=chunk_size,
      inclusive=inclusive,
      erases=len(others) > 1 and others[1] is not None,
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
  gate = tokens[2]
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
    span=SPAN,
    dtype=operand,
  )

  def as_saved(states):
    # The kernel of a channel gate keeps them transposed.
    return jnp.swapaxes(states, -1, -2) if _per_channel(gate) else states

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

  function = forms.by_kernel(
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
  (q, k), (v, *_), _ = tokens
  return shapes.operand(state.dtype, q, k, v)


def _per_channel(gate):
  return gate is not None and gate.shape[-1] > 1


def explain(
  op: str,
  implementation: str | Sequence[str] | None,
  q: Any,
  v: Any,
  **options: Any,
) -> str:
  """Says which kernel of an op each platform takes, see `request`."""
  return dispatch.explain(
    KERNELS[op], implementation, op=op, **request(q, v, **options)
  )


def request(q: Any, v: Any, **options: Any) -> dict[str, Any]:
  """What a kernel may refuse, from shapes and statics; see `_refuses`."""
  return dict(
    length=q.shape[1], channels=q.shape[-1], width=v.shape[-1], **options
  )


def _refuses(
  *,
  length: int,
  channels: int,
  width: int,
  dtype: jnp.dtype,
  per_channel: bool,
  form: str | None,
  chunk_size: int,
  inclusive: bool,
  erases: bool = False,
) -> str | None:
  """Why a kernel cannot serve a call, or None."""
  if form not in (None, 'chunkwise'):
    return f"form = {form!r}, it has the form 'chunkwise'"
  if length == 1:
    return 'T = 1, a single step needs no kernel'
  if dtype != jnp.float32:
    return f'the state is {dtype}, it computes in float32'
  for axis, size in (('H', channels), ('V', width)):
    if not 16 <= size <= 256:
      return f'{axis} = {size}, it takes 16 to 256'
  if chunk_size > SPAN:
    return f'chunk_size = {chunk_size}, its chunks are of {SPAN} tokens'
  if erases:
    return 'erase is given, it erases as much as it writes'
  return None


def _additive_refuses(*, inclusive, per_channel, **options):
  if not (inclusive or per_channel):
    return "read = 'exclusive', it needs a gate per channel for that"
  return _refuses(inclusive=inclusive, per_channel=per_channel, **options)


def _delta_refuses(*, inclusive, **options):
  if not inclusive:
    return "read = 'exclusive', it reads what a token has written"
  return _refuses(inclusive=inclusive, **options)


# Pallas takes as long to import as all of this package.
def _additive_module(gate, statics):
  """The kernel for a gate, with what it needs of the statics."""
  from efficient_attn.kernels.additive import channel_gate, scalar_gate

  if _per_channel(gate):
    return channel_gate, statics
  return scalar_gate, _without_read(statics)


def _delta_module(gate, statics):
  from efficient_attn.kernels.delta import channel_gate, scalar_gate

  module = channel_gate if _per_channel(gate) else scalar_gate
  return module, _without_read(statics)


def _without_read(statics):
  return {k: v for k, v in statics.items() if k != 'inclusive'}


def _arguments(tokens, segment_ids):
  """What a kernel takes: q, k, what there is of values, the gate, starts."""
  (q, k), values, gate = tokens
  starts = None
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)
  values = [x for x in values if x is not None]
  return q[:, :, :, 0], k[:, :, :, 0], *values, gate, starts


def _call(module, tokens, state, segment_ids, *, save=False, **statics):
  *arrays, gate, starts = _arguments(tokens, segment_ids)
  kernel, statics = module(gate, statics)
  return kernel.forward(*arrays, gate, state, starts, save=save, **statics)


def _forward(module, *args, **statics):
  out, last, states = _call(module, *args, save=True, **statics)
  return (out, last), states


def _backward(module, args, states, cotangents, **statics):
  tokens, _, segment_ids = args
  *arrays, gate, starts = _arguments(tokens, segment_ids)
  kernel, statics = module(gate, statics)
  d_q, d_k, *d_values, d_gate, first = kernel.backward(
    *arrays, gate, starts, states, *cotangents, **statics
  )
  keys = [x[:, :, :, None] for x in (d_q, d_k)]
  d_values += [None] * (len(tokens[1]) - len(d_values))
  return (keys, d_values, d_gate), first, None


def _implementation(module, refuses):
  return dispatch.Implementation(
    *(functools.partial(f, module) for f in (_call, _forward, _backward)),
    platforms=('tpu',),
    refuses=refuses,
  )


KERNELS = {
  'linear_attention': {
    'pallas_tpu': _implementation(_additive_module, _additive_refuses),
  },
  'delta_rule': {
    'pallas_tpu': _implementation(_delta_module, _delta_refuses),
  },
}
