"""The kernels of linear_attention, and which calls they serve."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from efficient_attn.ops import chunks, dispatch, shapes
from efficient_attn.ops.per_platform import differentiable
from efficient_attn.ops.recurrent import chunk_states, forms, gates

NAME = 'linear_attention'
SPAN = 128  # tokens between two states that the forward pass keeps


def recur(
  step: Callable,
  chunk: chunk_states.Chunk,
  tokens: Any,
  state: Array,
  *,
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
    tokens: ([q, k], [v], gate), see `matrix_recurrence.recur`; the gate as
      it is, without a floor.
    state: [B, K, G, H, V], before token 0.
    segment_ids: see `forms.recur`.
    form: see `forms.recur`.
    chunk_size: see `forms.recur`.
    inclusive: whether a token reads itself.
    implementation: see `linear_attention`.
    scale: factor on the output.
    dtype: of the output; None is that of the state.

  Returns:
    out: [B, T, K, G, V] and the state after the last token.
  """
  dtype = jnp.dtype(dtype or state.dtype)
  rows = dispatch.choose(
    KERNELS,
    implementation,
    op=NAME,
    **_request(tokens, state, form, chunk_size, inclusive),
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
    'step', 'chunk', 'form', 'chunk_size', 'scale', 'dtype', 'rows',
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
    KERNELS,
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

  def chosen(wrap, stage, **statics):
    functions = (wrap(getattr(passes, stage)) for passes in xla)
    return functools.partial(
      forms.per_accelerator, *functions, kernels=kernels(stage, **statics)
    )

  function = differentiable(
    chosen(call, 'call', dtype=dtype),
    chosen(forward, 'forward', dtype=dtype),
    chosen(backward, 'backward'),
    call(definition),
  )
  return function(tokens, state, segment_ids)


def _operand(tokens, state):
  (q, k), (v,), _ = tokens
  return shapes.operand(state.dtype, q, k, v)


def _per_channel(gate):
  return gate is not None and gate.shape[-1] > 1


def _request(tokens, state, form, chunk_size, inclusive):
  """What a kernel may refuse, from shapes and statics."""
  (q, _), (v,), gate = tokens
  return dict(
    length=q.shape[1],
    channels=q.shape[-1],
    width=v.shape[-1],
    dtype=state.dtype,
    per_channel=_per_channel(gate),
    form=form,
    chunk_size=chunk_size,
    inclusive=inclusive,
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
) -> str | None:
  """Why the kernel cannot serve a call, or None."""
  if form not in (None, 'chunkwise'):
    return f"form = {form!r}, it has the form 'chunkwise'"
  if length == 1:
    return 'T = 1, a single step needs no kernel'
  if dtype != jnp.float32:
    return f'the state is {dtype}, it computes in float32'
  if not (inclusive or per_channel):
    return "read = 'exclusive', it needs a gate per channel for that"
  for axis, size in (('H', channels), ('V', width)):
    if not 16 <= size <= 256:
      return f'{axis} = {size}, it takes 16 to 256'
  if chunk_size > SPAN:
    return f'chunk_size = {chunk_size}, its chunks are of {SPAN} tokens'
  return None


def _arguments(tokens, segment_ids):
  (q, k), (v,), gate = tokens
  starts = None
  if segment_ids is not None:
    starts = chunks.segment_starts(segment_ids)
  return q[:, :, :, 0], k[:, :, :, 0], v, gate, starts


def _module(gate, statics):
  """The kernel for a gate, with what it needs of the statics."""
  # Pallas takes as long to import as all of this package.
  from efficient_attn.kernels.additive import channel_gate, scalar_gate

  if _per_channel(gate):
    return channel_gate, statics
  return scalar_gate, {k: v for k, v in statics.items() if k != 'inclusive'}


def _call(tokens, state, segment_ids, *, save=False, **statics):
  *arrays, gate, starts = _arguments(tokens, segment_ids)
  module, statics = _module(gate, statics)
  return module.forward(*arrays, gate, state, starts, save=save, **statics)


def _forward(tokens, state, segment_ids, **statics):
  out, last, states = _call(tokens, state, segment_ids, save=True, **statics)
  return (out, last), states


def _backward(args, states, cotangents, **statics):
  tokens, _, segment_ids = args
  *arrays, gate, starts = _arguments(tokens, segment_ids)
  module, statics = _module(gate, statics)
  d_q, d_k, d_v, d_gate, first = module.backward(
    *arrays, gate, starts, states, *cotangents, **statics
  )
  keys = [x[:, :, :, None] for x in (d_q, d_k)]
  return (keys, [d_v], d_gate), first, None


KERNELS = {
  'pallas_tpu': dispatch.Implementation(
    call=_call,
    forward=_forward,
    backward=_backward,
    platforms=('tpu',),
    refuses=_refuses,
  ),
}
