"""Several delta-rule steps per token (DeltaProduct, 2502.10297).

  S_{t,0} = diag(alpha_t) S_{t-1}
  S_{t,j} = S_{t,j-1} + beta_{t,j} k_{t,j} (v_{t,j} - S_{t,j-1}^T k_{t,j})^T
  S_t = S_{t,M},     o_t = scale * S_t^T q_t

The transition of a token is a product of M generalised Householder matrices.
It is `delta_rule` on the sequence of T M steps, gated at the first step of a
token and read at the last.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.recurrent import forms
from efficient_attn.ops.recurrent.delta_rule import delta_rule


def delta_product(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K M H'],
  v: Float[Array, 'B T N M V'],
  beta: Float[Array, 'B T N M'],
  *,
  log_decay: Float[Array, '...'] | None = None,
  initial_state: Float[Array, 'B N H V'] | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  bidirectional: bool = False,
  **options,
) -> tuple[Float[Array, 'B T N V'], Float[Array, 'B N H V'] | None]:
  """M delta-rule steps per token; with M = 1 it is `delta_rule`.

  Args:
    q: queries.
    k: keys of the steps.
    v: values of the steps.
    beta: strengths of the steps.
    log_decay: the gate of a token, [B, T, N] or [B, T, N, H].
    initial_state: see `delta_rule`.
    segment_ids: see `delta_rule`.
    bidirectional: the sum of the op on the tokens and on the reversed tokens;
      the steps of a token keep their order.
    **options: scale, form, chunk_size (in steps) and implementation of
      `delta_rule`.

  Returns:
    See `delta_rule`.

  Raises:
    ValueError: shapes, dtypes or options that do not fit, and the remedy.
  """
  _check(q, k, v, beta, log_decay, segment_ids)
  steps = k.shape[3]

  def flat(x):  # [B, T, N, M, ...] to [B, T M, N, ...]
    x = jnp.moveaxis(x, 3, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def at(x, step):  # x at one step of its token, zeros at the others
    others = [jnp.zeros_like(x)] * (steps - 1)
    return flat(jnp.stack([*others[:step], x, *others[step:]], 3))

  def run(q, k, v, beta, log_decay, segment_ids):
    if segment_ids is not None:
      segment_ids = jnp.repeat(segment_ids, steps, axis=1)
    out, state = delta_rule(
      at(q, steps - 1),
      flat(k),
      flat(v),
      flat(beta),
      log_decay=None if log_decay is None else at(log_decay, 0),
      initial_state=initial_state,
      segment_ids=segment_ids,
      **options,
    )
    return out[:, steps - 1 :: steps], state

  tokens = q, k, v, beta, log_decay, segment_ids
  out, state = run(*tokens)
  if not bidirectional:
    return out, state
  shapes.check_directions(True, initial_state)
  backward, _ = run(*forms.reversed_tokens(tokens))
  return out + jnp.flip(backward, 1), None


def _check(q, k, v, beta, log_decay, segment_ids):
  for name, x in (('k', k), ('v', v)):
    if x.ndim != 5:
      raise ValueError(
        f'{name} has shape {x.shape}: pass [batch, length, heads, steps, '
        'channels].'
      )
  shapes.check_qkv(q, k[:, :, :, 0], v[:, :, :, 0])
  batch, length, _, steps, _ = k.shape
  if v.shape[3] != steps:
    raise ValueError(
      f'v has {v.shape[3]} steps and k {steps}: pass equally many.'
    )
  shapes.check_shapes(
    {
      'beta': (beta, v.shape[:-1]),
      'segment_ids': (segment_ids, (batch, length)),
    }
  )
  if log_decay is not None and log_decay.ndim not in (3, 4):
    raise ValueError(
      f'log_decay has shape {log_decay.shape}: pass a gate per token, '
      '[B, T, N] or [B, T, N, H].'
    )
