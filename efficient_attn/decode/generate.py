"""Generating text: one prefill of the prompt, then one token a step."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.decode.sampling import sample


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
) -> jax.Array:
  """Continues each prompt by `length` tokens.

  Args:
    model: a language model.
    prompt: int32 [B, P], P >= 1.
    key: PRNG key.
    length: how many tokens to add.
    temperature: see `sample`, as are `top_k` and `top_p`.

  Returns:
    int32 [B, length].
  """
  draw = functools.partial(
    sample, temperature=temperature, top_k=top_k, top_p=top_p
  )
  keys = jax.random.split(key, length)
  cache = model.init_cache(prompt.shape[0], prompt.shape[1] + length)
  logits, cache = model(prompt, cache=cache)
  token = draw(logits[:, -1], keys[0])

  def step(carry, key):
    token, cache = carry
    logits, cache = model(token[:, None], cache=cache)
    new = draw(logits[:, -1], key)
    return (new, cache), new

  _, rest = jax.lax.scan(step, (token, cache), keys[1:])
  return jnp.concatenate([token[:, None], rest.T], axis=1)
