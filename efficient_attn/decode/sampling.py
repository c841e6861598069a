"""Choosing the next token from its logits."""

import jax
import jax.numpy as jnp


def sample(
  logits: jax.Array,
  key: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Draws a token from softmax(logits / temperature), cut to its head.

  Args:
    logits: [B, vocab].
    key: PRNG key.
    temperature: 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest most likely tokens whose probabilities reach p
      (Holtzman et al. 1904.09751), after `top_k`.

  Returns:
    int32 [B].
  """
  if temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / temperature
  if top_k or top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k:
      past_k = jnp.arange(logits.shape[-1]) >= top_k
      ranked = jnp.where(past_k, -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    choice = jax.random.categorical(key, ranked)[:, None]
    return jnp.take_along_axis(order, choice, axis=-1)[:, 0].astype(jnp.int32)
  return jax.random.categorical(key, logits).astype(jnp.int32)
