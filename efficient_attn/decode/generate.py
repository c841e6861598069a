"""Generating text: one prefill of the prompts, then one token a step.

Prompts of unequal length stand in one batch with padding in front, so that
they end together. Where a mixer counts blocks from the start of its row, and
so cannot begin with padding, all prompts begin together instead: the tokens
that the shortest has are one prefill, and the rest of the others one token a
step.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.config import ConfigError
from efficient_attn.decode.sampling import sample
from efficient_attn.layers.embed import LearnedPosition


def generate(
  model: nnx.Module,
  prompt: jax.Array,
  key: jax.Array,
  *,
  length: int,
  prompt_lengths: Sequence[int] | None = None,
  temperature: float = 1.0,
  top_k: int = 0,
  top_p: float = 1.0,
  allowed: jax.Array | None = None,
  stop: tuple[int, ...] = (),
  source: jax.Array | None = None,
  source_ids: jax.Array | None = None,
) -> jax.Array:
  """Continues each prompt by `length` tokens.

  Args:
    model: a language model.
    prompt: int32 [B, P], P >= 1; see `pad`.
    key: PRNG key.
    length: how many tokens to add.
    prompt_lengths: of the rows, which end at P and may hold anything before;
      None for P.
    temperature: see `sample`, as are `top_k` and `top_p`.
    allowed: bool [V], the tokens that may be drawn; None for all. V may be
      below the vocabulary of the model, whose other tokens are never drawn.
    stop: tokens that end a row. What follows the first of them is that token,
      and nothing is computed once all rows have ended.
    source: int32 [B, S], what an encoder-decoder reads beside the prompt, which
      is the beginning of the target.
    source_ids: int32 [B, S], 0 for padding of sources of unequal length.

  Returns:
    int32 [B, length].

  Raises:
    ConfigError: an option is out of range, or the model has fewer learned
      positions than the tokens that it reads.
  """
  batch, size = prompt.shape
  check_length(model, size, length)
  prompt_lengths = check_lengths(prompt, prompt_lengths)
  prefix = size
  if (prompt_lengths == size).all():
    ragged = 'no'
  elif all(b.mixer.left_padding for b in model.stack.blocks()):
    ragged = 'padding'
  else:
    ragged, prefix = 'steps', int(prompt_lengths.min())
  return _generate(
    model,
    prompt,
    prompt_lengths,
    key,
    allowed,
    source,
    source_ids,
    ragged=ragged,
    prefix=prefix,
    length=length,
    stop=stop,
    draw=(temperature, top_k, top_p),
  )


@functools.partial(
  jax.jit, static_argnames=('ragged', 'prefix', 'length', 'stop', 'draw')
)
def _generate(
  model,
  prompt,
  lengths,
  key,
  allowed,
  source,
  source_ids,
  *,
  ragged,
  prefix,
  length,
  stop,
  draw,
):
  """Fills the columns of [B, P + length] from `prefix` on."""
  batch, size = prompt.shape
  temperature, top_k, top_p = draw
  ids, ends = None, jnp.full_like(lengths, size)  # where drawn tokens begin
  if ragged == 'padding':
    ids = (jnp.arange(size) >= size - lengths[:, None]).astype(jnp.int32)
  if ragged == 'steps':
    prompt, ends = jax.vmap(jnp.roll)(prompt, lengths - size), lengths
  columns = jnp.pad(prompt, ((0, 0), (0, length)))
  keys = jax.random.split(key, size - prefix + length)
  ending = jnp.asarray(stop, jnp.int32)

  def extend(columns, done, at, logits):
    """Draws column `at` for the rows whose prompt has ended."""
    logits = logits[:, -1]
    if allowed is not None:
      logits = jnp.where(allowed, logits[:, : len(allowed)], -jnp.inf)
    new = sample(
      logits,
      keys[at - prefix],
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
    )
    new = jnp.where(done, columns[:, at - 1], new)
    drawn = at >= ends
    new = jnp.where(drawn, new, columns[:, at])
    if stop:
      done = done | drawn & jnp.isin(new, ending)
    return columns.at[:, at].set(new), done

  # The model does not read the last token.
  room = size + length - 1
  if source is None:
    cache = model.init_cache(batch, room)
  else:
    cache = model.init_cache(source, room, source_ids=source_ids)
  logits, cache = model(prompt[:, :prefix], segment_ids=ids, cache=cache)
  done = jnp.zeros(batch, bool)
  columns, done = extend(columns, done, prefix, logits)

  def step(state):
    columns, done, cache, at = state
    token = jax.lax.dynamic_slice_in_dim(columns, at - 1, 1, axis=1)
    logits, cache = model(token, cache=cache)
    return *extend(columns, done, at, logits), cache, at + 1

  state, steps = (columns, done, cache, prefix + 1), size + length - prefix - 1
  if stop:
    last = size + length
    state = jax.lax.while_loop(
      lambda state: (state[3] < last) & ~state[1].all(), step, state
    )
    # Rows that ended early go on with their last token.
    columns, _, _, at = state
    final = jax.lax.dynamic_slice_in_dim(columns, at - 1, 1, axis=1)
    columns = jnp.where(jnp.arange(columns.shape[1]) < at, columns, final)
  else:
    columns, *_ = jax.lax.fori_loop(0, steps, lambda _, s: step(s), state)
  new = ends[:, None] + jnp.arange(length)
  return jnp.take_along_axis(columns, new, axis=1)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
  """Returns prompts as rows that end together [B, P], and their lengths [B]."""
  lengths = np.array([len(p) for p in prompts], np.int32)
  rows = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in zip(rows, prompts, strict=True):
    row[len(row) - len(prompt) :] = prompt
  return rows, lengths


def check_lengths(prompt, lengths: Sequence[int] | None) -> np.ndarray:
  """Returns the lengths of prompts [B, P], by default P, or refuses them."""
  batch, size = prompt.shape
  lengths = np.asarray([size] * batch if lengths is None else lengths, np.int32)
  inside = (1 <= lengths) & (lengths <= size)
  if lengths.shape != (batch,) or not inside.all():
    raise ConfigError(
      f'prompt_lengths={lengths.tolist()} must be one number from 1 to {size}'
      f' for each of {batch} prompts'
    )
  return lengths


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
