"""The router of a mixture of experts: which experts a token has, how much each.

  log s_e = log softmax(x W + b)_e, or log sigmoid of it;  weights as
  softmax of log s over the chosen experts where they are normalised, else s

Renormalised scores are a softmax over the chosen logits, so Mixtral, Qwen3 and
gpt-oss (top-k, then softmax) are one formula. Experts are chosen by s plus a
correction that no weight sees (DeepSeek-V3, 2412.19437), and if there are
groups, within the best of them: a group counts as the sum of its `group_best`
best experts (DeepSeek-V2: 1, V3: 2).

Logits and scores are float32.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.param import fan_in_normal, param, value_of
from efficient_attn.values import (
  NonNegativeFloat,
  OneOf,
  Positive,
  PositiveFloat,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """Options of choosing and weighting experts, and of evening their loads."""

  scores: Annotated[str, OneOf(('softmax', 'sigmoid'))] = 'softmax'
  normalize: bool = True  # the weights of a token, to a sum of one
  scale: PositiveFloat = 1.0  # of the weights
  groups: Positive = 1
  top_groups: Positive = 1  # how many of them a token chooses from
  group_best: Positive = 1
  bias: bool = False  # of the logits
  correction: bool = False  # of the choice
  balance_rate: NonNegativeFloat = 0.001  # of the correction a step
  # Weights of objectives: that of even loads (Switch, 2101.03961), and that of
  # small logits (ST-MoE, 2202.08906).
  balance_weight: NonNegativeFloat = 0.01
  z_weight: NonNegativeFloat = 0.0

  def check(self, num_experts: int, top_k: int) -> None:
    """Raises a ConfigError where no such choice exists."""
    if num_experts % self.groups:
      raise ConfigError(
        f'router.groups={self.groups} does not divide num_experts={num_experts}'
      )
    size = num_experts // self.groups
    if self.top_groups > self.groups:
      raise ConfigError(
        f'router.top_groups={self.top_groups} exceeds router.groups='
        f'{self.groups}'
      )
    if self.group_best > size:
      raise ConfigError(
        f'router.group_best={self.group_best} exceeds the {size} experts of a '
        'group'
      )
    if top_k > self.top_groups * size:
      raise ConfigError(
        f'top_k={top_k} exceeds the {self.top_groups * size} experts to choose '
        'from; lower it, or raise num_experts or router.top_groups'
      )

  def log_scores(self, logits: jax.Array) -> jax.Array:
    """Returns log s of logits [..., E]."""
    if self.scores == 'softmax':
      return jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.log_sigmoid(logits)

  def choose(
    self, logits: jax.Array, correction: jax.Array | None, top_k: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the weights and the ids [..., k] of experts by logits [..., E].

    The best comes first; of equal ones the one with the lowest id.
    """
    log_scores = self.log_scores(logits)
    ranks = jax.lax.stop_gradient(jnp.exp(log_scores))
    if correction is not None:
      ranks = ranks + jax.lax.stop_gradient(correction)
    if self.groups > 1:
      grouped = ranks.reshape(*ranks.shape[:-1], self.groups, -1)
      best = jnp.sum(jax.lax.top_k(grouped, self.group_best)[0], axis=-1)
      kept = one_hot(jax.lax.top_k(best, self.top_groups)[1], self.groups)
      kept = jnp.any(kept, axis=-2)[..., None]
      ranks = jnp.where(kept, grouped, -jnp.inf).reshape(ranks.shape)
    ids = jax.lax.top_k(ranks, top_k)[1]
    chosen = one_hot(ids, logits.shape[-1])
    log_scores = jnp.sum(jnp.where(chosen, log_scores[..., None, :], 0), -1)
    if self.normalize:
      weights = jax.nn.softmax(log_scores, axis=-1)
    else:
      weights = jnp.exp(log_scores)
    return self.scale * weights, ids


def one_hot(ids: jax.Array, size: int) -> jax.Array:
  """Returns bool [..., size]; a comparison, so that it has no scatter."""
  return ids[..., None] == jnp.arange(size)


class Router(nnx.Module):
  """Maps x [B, T, D] to the logits of experts, and these to a choice.

  Args:
    d_model: D.
    num_experts: E.
    top_k: how many experts a token has.
    routing: how they are chosen.
    rngs: of the parameters.
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    top_k: int,
    routing: Routing,
    *,
    rngs: nnx.Rngs,
  ):
    routing.check(num_experts, top_k)
    weight = fan_in_normal()(rngs.params(), (d_model, num_experts), d_model)
    zeros = jnp.zeros(num_experts)
    self.weight = param(weight, ('embed', None), inputs=1)
    self.bias = param(zeros, (None,)) if routing.bias else None
    self.correction = param(zeros, (None,)) if routing.correction else None
    self.num_experts, self.top_k = num_experts, top_k
    self.routing = routing

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns float32 [B, T, E]."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    logits = jax.lax.dot_general(
      x,
      value_of(self.weight, x.dtype),
      (((2,), (0,)), ((), ())),
      precision=jax.lax.Precision.HIGHEST,
      out_sharding=sharding.current(
        sharding.activation_spec(('batch', None, None))
      ),
    )
    if self.bias is not None:
      logits = logits + value_of(self.bias, logits.dtype)
    return logits

  def __call__(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the weights, float32, and the ids [B, T, k]."""
    correction = self.correction
    if correction is not None:
      correction = value_of(correction, logits.dtype)

    def choose(logits, correction):
      return self.routing.choose(logits, correction, self.top_k)

    return sharding.local_op(choose, ('BTE', 'E'), 'BTE')(logits, correction)

  def penalty(
    self, logits: jax.Array, ids: jax.Array, real: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted objectives, a scalar, and the load of each expert.

    The gradient of the correction is its excess load, see `train.balance`.

    Args:
      logits: [B, T, E].
      ids: [B, T, k].
      real: bool [B, T], the tokens that count; None: all.
    """
    counts = jnp.ones(logits.shape[:2], logits.dtype)
    if real is not None:
      counts = jnp.where(real, sharding.like(counts, real), 0)
    total = jnp.maximum(jnp.sum(counts), 1)
    chosen = jnp.sum(one_hot(ids, self.num_experts), axis=2)
    loads = jnp.sum(chosen * counts[..., None], axis=(0, 1))
    scores = self.routing.log_scores(logits)
    shares = jax.nn.softmax(scores, axis=-1) * counts[..., None]
    shares = jnp.sum(shares, axis=(0, 1)) / total
    balance = self.num_experts * jnp.sum(loads / total * shares)
    z = jax.nn.logsumexp(logits, axis=-1)
    z = jnp.sum(z * z * counts) / total
    routing = self.routing
    penalty = routing.balance_weight * balance + routing.z_weight * z
    if self.correction is not None:
      excess = jax.lax.stop_gradient(loads - jnp.mean(loads)) / total
      correction = value_of(self.correction, penalty.dtype)
      penalty += jnp.sum(without_value(correction) * excess)
    return penalty, loads


def without_value(x: jax.Array) -> jax.Array:
  """Returns zeros with the gradient of x."""
  return x - jax.lax.stop_gradient(x)
