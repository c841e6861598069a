"""Dense softmax attention, the definition the other implementations meet.

    o_t = sum_s p_ts v_s,   p_t = softmax_s(cap(scale q_t . k_s) + bias_ts)

over the admitted keys s, with cap(x) = c tanh(x / c). A sink (Xiao et al.
2024; learned as in gpt-oss) adds exp(sink_n) to the denominator only. O(T S)
time and memory; forward mode, higher order and float64 all work.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from efficient_attn.ops import masks, scores
from efficient_attn.ops.products import product
from efficient_attn.ops.shapes import Scalar
from efficient_attn.ops.softmax.hidden import may_hide, without_hidden
from efficient_attn.ops.softmax.stats import Stats, exp_below, largest


def attention_reference(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K V'],
  *,
  mask: masks.Mask | None = None,
  bias: scores.Score | None = None,
  scale: Scalar | None = None,
  logits_soft_cap: Scalar | None = None,
  sinks: Float[Array, 'N'] | None = None,
) -> tuple[Float[Array, 'B T N V'], Stats]:
  """Attention with the whole matrix of logits in memory.

  Returns:
    The output in the query's dtype, 0 where a row attends to nothing, and the
    softmax denominators in at least float32.
  """
  B, T, N, H = query.shape
  S, K, V = value.shape[1:]
  G = N // K  # query heads that share a kv head
  stats = jnp.promote_types(query.dtype, jnp.float32)
  scale = H**-0.5 if scale is None else scale

  def folded(x):  # [#B, #N, T, S] -> [#B, #K, #G, T, S]
    heads = (1, 1) if x.shape[1] == 1 else (K, G)
    return x.reshape(x.shape[:1] + heads + x.shape[2:])

  def attend(q, k, v, admitted, bias, scale, cap, sinks):
    logits = scale * product('bkrh,bksh->bkrs', q, k, dtype=stats)
    logits = logits.reshape(B, K, G, T, S)
    if cap is not None:
      logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
      logits = logits + folded(bias.dense(T, S)).astype(stats)
    if admitted is not None:
      logits = jnp.where(admitted, logits, -jnp.inf)

    sunk = []
    if sinks is not None:
      sunk = [sinks.astype(stats).reshape(K, G, 1)]
    top = largest(logits, *sunk)
    weights = exp_below(logits, top[..., None])
    total = jnp.sum(weights, axis=-1)
    for sink in sunk:
      total = total + exp_below(sink, top)

    # Divided after the product, which is V wide where the weights are S wide.
    out = product(
      'bkrs,bksv->bkrv',
      weights.reshape(B, K, G * T, S),
      v,
      operand=v.dtype,
      dtype=stats,
    )
    return Stats(top, total).divide(out.reshape(B, K, G, T, V)), top, total

  # Heads first, and a group folded into rows: one plain batched matmul.
  q = query.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
  q = q.reshape(B, K, G * T, H)
  k, v = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)

  def attend_to_visible(q, k, v, admitted, *rest):
    shape = *admitted.shape[:2], G, T, S
    rows = jnp.broadcast_to(admitted, shape).reshape(*shape[:2], G * T, S)
    return attend(*without_hidden(rows, q, k, v), admitted, *rest)

  @jax.custom_jvp
  def attend_once(*operands):
    # One query spends its time on reading keys and values: they are copied
    # without what is hidden only where that has reached the output.
    found = attend(*operands)
    clean = jnp.all(jnp.isfinite(found[0]))
    return lax.cond(clean, lambda: found, lambda: attend_to_visible(*operands))

  @attend_once.defjvp
  def differentiated(primals, tangents):
    return jax.jvp(attend_to_visible, primals, tangents)

  if not may_hide(mask, T, S):
    run = attend
  else:
    run = attend_to_visible if T > 1 else attend_once
  admitted = None if mask is None else folded(mask.dense(T, S))
  out, top, total = run(q, k, v, admitted, bias, scale, logits_soft_cap, sinks)
  out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, V).astype(query.dtype)
  top, total = (x.transpose(0, 3, 1, 2).reshape(B, T, N) for x in (top, total))
  return out, Stats(top, total)
