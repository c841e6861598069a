"""Sums over tokens of losses whose logits never exist all at once.

With a vocabulary of 32,000 the float32 logits of 4 x 4096 tokens take 2 GiB,
more than everything else in a step. `sum_over_tokens` computes them for a chunk
of tokens at a time. When differentiated it takes the gradient of each chunk in
the same pass, so that no logit is computed twice:

  sums = sum_c f(c),    f(c) = loss(head(hidden[c]), targets[c])
  d hidden[c] = d f(c) / d hidden[c],    d head = sum_c d f(c) / d head
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding

# A chunk has at least so many tokens, as the gradient of the head is read and
# written once a chunk, and more where the vocabulary is small.
MIN_TOKENS = 512
LOGITS = 2**22


def sum_over_tokens(
  loss: Callable[..., dict[str, jax.Array]],
  head: nnx.Module,
  hidden: jax.Array,
  targets: Mapping[str, jax.Array],
  teacher: tuple[nnx.Module, jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Sums a loss over tokens, whose logits are `head.logits(hidden)`.

  Args:
    loss: (logits [1, C, V], targets of these tokens, teacher's logits or None)
      to a dict of float32 sums. Of these 'objective' alone has a gradient; it
      goes to `head` and `hidden`.
    head: has `logits`, from [1, C, D] to [1, C, V].
    hidden: [B, T, D].
    targets: arrays [B, T, ...].
    teacher: another head and hidden [B, T, D'].

  Returns:
    The sums over all tokens.
  """
  graphdef, params = nnx.split(head)
  fixed = None
  if teacher is not None:
    other, fixed = nnx.split(teacher[0])
    targets = {**targets, '_teacher': teacher[1]}

  def logits(params, hidden):
    return nnx.merge(graphdef, params).logits(hidden)

  def one_chunk(params, hidden, targets, fixed):
    targets, guide = dict(targets), None
    if fixed is not None:
      guide = nnx.merge(other, fixed).logits(targets.pop('_teacher'))
    return loss(logits(params, hidden), targets, guide)

  def local(params, hidden, targets, fixed):
    tokens = hidden.shape[0] * hidden.shape[1]
    vocabulary = jax.eval_shape(logits, params, hidden).shape[-1]
    count = -(-tokens // max(MIN_TOKENS, LOGITS // vocabulary))
    chunks = jax.tree.map(
      functools.partial(_cut, count=count), (hidden, targets)
    )
    sums = _summed(one_chunk, params, *chunks, fixed)
    return jax.tree.map(lambda x: x[None], sums)  # of this shard

  run = sharding.local_op(
    local, (_replicated, 'BTD', _by_token, _replicated), 'B'
  )
  sums = run(params, hidden, dict(targets), fixed)
  return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss, params, hidden, targets, fixed):
  """Adds loss(params, hidden[c], targets[c], fixed) over chunks c."""

  def one(hidden, targets):
    return loss(params, hidden, targets, fixed), None

  return _accumulate(one, hidden, targets)[0]


def _forward(loss, params, hidden, targets, fixed):
  def one(hidden, targets):
    def objective(params, hidden):
      sums = loss(params, hidden, targets, fixed)
      return sums['objective'], sums

    gradient = jax.grad(objective, (0, 1), has_aux=True)
    (d_params, d_hidden), sums = gradient(params, hidden)
    return (sums, d_params), d_hidden

  (sums, d_params), d_hidden = _accumulate(one, hidden, targets)
  return sums, (d_params, d_hidden)


def _backward(loss, gradients, cotangents):
  del loss
  scale = cotangents['objective']
  scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
  return *scaled, None, None


_summed.defvjp(_forward, _backward)


def _accumulate(f, *chunks):
  """Returns the sum of the first result of f over chunks, and the others."""
  first = jax.tree.map(lambda x: x[0], chunks)
  if len(jax.tree.leaves(chunks)[0]) == 1:
    total, rest = f(*first)
    return total, jax.tree.map(lambda x: x[None], rest)

  def add(total, chunk):
    found, rest = f(*chunk)
    return jax.tree.map(jnp.add, total, found), rest

  shapes, _ = jax.eval_shape(f, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  return jax.lax.scan(add, zeros, chunks)


def _cut(x, count):
  """Cuts [B, T, ...] into [count, 1, C, ...], with zeros behind."""
  x = x.reshape(-1, *x.shape[2:])
  missing = -len(x) % count
  x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(count, 1, -1, *x.shape[1:])


def _replicated(x: Any) -> str:
  return '_' * x.ndim


def _by_token(x: Any) -> str:
  return 'BT' + '_' * (x.ndim - 2)
