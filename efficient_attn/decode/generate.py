"""Generating text: one prefill of the prompt, then one token a step."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.decode.sampling import sample
from efficient_attn.layers.embed import LearnedPosition


@functools.partial(
  jax.jit, static_argnames=('length', 'temperature', 'top_k', 'top_p')
)
def generate(
  model: nnx.Module,
  prompt: jax.Array,
  key: jax.Array,
  *,
  length: int,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  allowed: jax.Array | None = None,
) -> jax.Array:
  """Continues each prompt by `length` tokens.

  Args:
    model: a language model.
    prompt: int32 [B, P], P >= 1.
    key: PRNG key.
    length: how many tokens to add.
    temperature: see `sample`, as are `top_k` and `top_p`.
    allowed: bool [V], the tokens that may be drawn; None for all. V may be
      below the vocabulary of the model, whose other tokens are never drawn.

  Returns:
    int32 [B, length].

  Raises:
    ConfigError: an option is out of range, or the model has fewer learned
      positions than the tokens that it reads.
  """
  check_length(model, prompt.shape[1], length)

  def draw(logits, key):
    if allowed is not None:
      logits = jnp.where(allowed, logits[:, : len(allowed)], -jnp.inf)
    return sample(
      logits, key, temperature=temperature, top_k=top_k, top_p=top_p
    )

  keys = jax.random.split(key, length)
  # The model does not read the last token.
  cache = model.init_cache(prompt.shape[0], prompt.shape[1] + length - 1)
  logits, cache = model(prompt, cache=cache)
  token = draw(logits[:, -1], keys[0])

  def step(carry, key):
    token, cache = carry
    logits, cache = model(token[:, None], cache=cache)
    new = draw(logits[:, -1], key)
    return (new, cache), new

  _, rest = jax.lax.scan(step, (token, cache), keys[1:])
  return jnp.concatenate([token[:, None], rest.T], axis=1)


def check_length(model: nnx.Module, prompt: int, length: int) -> None:
  """Raises `ConfigError` when `prompt` + `length` tokens do not fit."""
  if prompt < 1 or length < 1:
    raise ConfigError(
      f'a prompt of {prompt} tokens and length={length}: both must be >= 1'
    )
  if isinstance(model.position, LearnedPosition):
    rows, needed = model.position.table.shape[0], prompt + length - 1
    if needed > rows:
      raise ConfigError(
        f'a prompt of {prompt} tokens and length={length} need {needed} '
        f'learned positions, but model.max_len={rows}; shorten them'
      )
