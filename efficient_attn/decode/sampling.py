"""Choosing the next token from its logits."""

import math

import jax
import jax.numpy as jnp

from efficient_attn.config import ConfigError


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
    top_k: keep the k most likely tokens; 0 keeps all, as does -1.
    top_p: keep the fewest most likely tokens whose probabilities reach p
      (Holtzman et al. 1904.09751), after `top_k`.

  Returns:
    int32 [B].

  Raises:
    ConfigError: an option is out of range.
  """
  check_options(temperature, top_k, top_p)
  if top_k > logits.shape[-1]:
    raise ConfigError(
      f'top_k={top_k} is more than the {logits.shape[-1]} tokens of the '
      'vocabulary; 0 keeps all'
    )
  if temperature < jnp.finfo(jnp.float32).tiny:  # which 1 / temperature needs
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / temperature  # at most 0: whatever overflows is -inf
  if top_k > 0 or top_p < 1:
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k > 0:
      past_k = jnp.arange(logits.shape[-1]) >= top_k
      ranked = jnp.where(past_k, -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where(before < top_p, ranked, -jnp.inf)
    choice = jax.random.categorical(key, ranked)[:, None]
    return jnp.take_along_axis(order, choice, axis=-1)[:, 0].astype(jnp.int32)
  return jax.random.categorical(key, logits).astype(jnp.int32)


def check_options(temperature: float, top_k: int, top_p: float) -> None:
  """Raises `ConfigError` when an option of `sample` is out of range."""
  if not 0 <= temperature < math.inf:
    raise ConfigError(
      f'temperature={temperature} must be a number >= 0; 0 is greedy'
    )
  if top_k < -1:
    raise ConfigError(f'top_k={top_k} must be >= 0; 0 keeps all tokens')
  if not 0 < top_p <= 1:
    raise ConfigError(f'top_p={top_p} must be in (0, 1]; 1 keeps all tokens')
