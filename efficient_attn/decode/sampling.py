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
  if is_greedy(temperature):
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  ranked, order = _head(logits, temperature, top_k, top_p)
  choice = jax.random.categorical(key, ranked)
  if order is not None:
    choice = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
  return choice.astype(jnp.int32)


def probabilities(
  logits: jax.Array,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
) -> jax.Array:
  """Returns the probabilities by which `sample` draws, [..., vocab].

  Those of a temperature of 0 are one and zeros.
  """
  check_options(temperature, top_k, top_p)
  if is_greedy(temperature):
    return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
  ranked, order = _head(logits, temperature, top_k, top_p)
  found = jax.nn.softmax(ranked, axis=-1)
  if order is not None:
    found = jnp.take_along_axis(found, jnp.argsort(order, axis=-1), axis=-1)
  return found


def is_greedy(temperature: float) -> bool:
  """Tells whether a temperature is 0, or too small to divide by."""
  return temperature < jnp.finfo(jnp.float32).tiny


def _head(logits, temperature, top_k, top_p):
  """Returns the logits to draw from, and their order if they are sorted."""
  if top_k > logits.shape[-1]:
    raise ConfigError(
      f'top_k={top_k} is more than the {logits.shape[-1]} tokens of the '
      'vocabulary; 0 keeps all'
    )
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  logits = logits / temperature  # at most 0: whatever overflows is -inf
  if top_k <= 0 and top_p == 1:
    return logits, None
  order = jnp.argsort(-logits, axis=-1)
  ranked = jnp.take_along_axis(logits, order, axis=-1)
  if top_k > 0:
    past_k = jnp.arange(logits.shape[-1]) >= top_k
    ranked = jnp.where(past_k, -jnp.inf, ranked)
  found = jax.nn.softmax(ranked, axis=-1)
  before = jnp.cumsum(found, axis=-1) - found
  return jnp.where(before < top_p, ranked, -jnp.inf), order


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
