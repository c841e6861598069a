"""The sLSTM cell of xLSTM (Beck et al. 2405.04517).

Per head, with the gates' inputs and a recurrent matrix R for each of them:

  z, i, f, o = inputs_t + R h_{t-1} + bias
  c_t = exp(log_sigmoid(f)) c_{t-1} + exp(i) tanh(z)
  n_t = exp(log_sigmoid(f)) n_{t-1} + exp(i)
  h_t = sigmoid(o) c_t / n_t

c and n are kept relative to exp(m_t), m_t = max(log_sigmoid(f) + m_{t-1}, i).
R makes h_t depend on h_{t-1} through the gates (memory mixing), so there is
no other form than the recurrence: O(T H^2) work in T steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks, shapes
from efficient_attn.ops.recurrent import forms


def slstm(
  z: Float[Array, 'B T N H'],
  i: Float[Array, 'B T N H'],
  f: Float[Array, 'B T N H'],
  o: Float[Array, 'B T N H'],
  recurrent: Float[Array, '4 N H H'],
  *,
  bias: Float[Array, '4 N H'] | None = None,
  initial_state: tuple[Array, Array, Array, Array] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N H'], tuple[Array, Array, Array, Array]]:
  """The equations of the module docstring for every head.

  Args:
    z: what is written, before its tanh.
    i: logarithm of the input gate.
    f: logit of the forget gate.
    o: logit of the output gate.
    recurrent: R of z, i, f and o; maps the last axis but one to the last.
    bias: of z, i, f and o.
    initial_state: what a call returned; part of the first segment.
    segment_ids: the state is reset at every token whose id differs from the
      id of the token before it.
    form: 'recurrent' or None.
    implementation: None or 'xla'.

  Returns:
    h: [B, T, N, H] in the dtype of z.
    state: (h, c, n, m), each [B, N, H], float32 (float64 for float64 inputs).
      Where n is 0 the cell is empty, whatever m is. Gradients take m for a
      constant.
  """
  forms.check(form, implementation, 'slstm')
  if form not in (None, 'recurrent'):
    raise NotImplementedError(
      f'slstm has no {form} form, because its gates read the last output: pass '
      "'recurrent' or None."
    )
  _check(z, i, f, o, recurrent, bias, initial_state, segment_ids)
  dtype = shapes.accumulator(z, i, f, o, recurrent, bias, initial_state)
  batch, _, *channels = z.shape
  state = (jnp.zeros((batch, *channels), dtype),) * 4
  if initial_state is not None:
    state = tuple(part.astype(dtype) for part in initial_state)
  recurrent = recurrent.astype(dtype)

  def body(state, inputs):
    gates, start = inputs
    if start is not None:
      state = jax.tree.map(lambda s: jnp.where(start, 0, s), state)
    mixed = jnp.einsum(
      'bnh,gnhk->gbnk',
      state[0],
      recurrent,
      precision=jax.lax.Precision.HIGHEST,
    )
    if bias is not None:
      mixed = mixed + bias[:, None].astype(dtype)
    state = _cell(state, *(gates.astype(dtype) + mixed))
    return state, state[0]

  gates = jnp.stack([x.swapaxes(0, 1) for x in (z, i, f, o)], 1)
  start = None
  if segment_ids is not None:
    start = chunks.segment_starts(segment_ids).T[..., None, None]
  state, h = jax.lax.scan(body, state, (gates, start))
  return h.swapaxes(0, 1).astype(z.dtype), state


def _cell(state, z, i, f, o):
  _, c, n, m = state
  log_forget = jax.nn.log_sigmoid(f)
  past = jnp.where(n > 0, log_forget + m, -jnp.inf)
  m = jax.lax.stop_gradient(jnp.maximum(past, i))
  forget, write = jnp.exp(past - m), jnp.exp(i - m)
  c = forget * c + write * jnp.tanh(z)
  n = forget * n + write
  return jax.nn.sigmoid(o) * c / n, c, n, m


def _check(z, i, f, o, recurrent, bias, initial_state, segment_ids):
  if z.ndim != 4 or z.shape[1] == 0:
    raise ValueError(
      f'z has shape {z.shape}: pass [batch, length >= 1, heads, channels].'
    )
  batch, length, heads, channels = z.shape
  wanted = {
    'i': (i, z.shape),
    'f': (f, z.shape),
    'o': (o, z.shape),
    'recurrent': (recurrent, (4, heads, channels, channels)),
    'bias': (bias, (4, heads, channels)),
    'segment_ids': (segment_ids, (batch, length)),
  }
  if initial_state is not None:
    for index, part in enumerate(initial_state):
      wanted[f'initial_state[{index}]'] = part, (batch, heads, channels)
  shapes.check_shapes(wanted)
  for name, x in dict(z=z, i=i, f=f, o=o, recurrent=recurrent).items():
    shapes.check_floating(name, x)
