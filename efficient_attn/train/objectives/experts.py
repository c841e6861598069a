"""Sums of an objective that come from mixtures of experts.

A mixture adds objectives of its own, even loads and small logits, which depend
on the batch, and its loads are worth a look, see `layers.moe`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.capture import captured
from efficient_attn.layers.moe import MoE

LOAD = 'expert_load.'  # and the number of the layer


def routed(
  model: nnx.Module, f: Callable, **inputs: Any
) -> tuple[Any, dict[str, list[jax.Array]]]:
  """Returns f(**inputs), a call of the model, and what its mixtures tap."""
  if not any(isinstance(m, MoE) for _, m in nnx.iter_modules(model)):
    return f(**inputs), {}
  return captured(f, 'penalty', 'expert_load')(**inputs)


def routing_sums(
  taps: Mapping[str, list[jax.Array]], weight: jax.Array
) -> dict[str, jax.Array]:
  """Returns the sums of the mixtures of one batch.

  Args:
    taps: from `routed`.
    weight: of the batch, by which its means count.
  """
  if not taps:
    return {}
  loads = {f'{LOAD}{i}': x for i, x in enumerate(taps['expert_load'])}
  return loads | {'penalty': weight * sum(taps['penalty'])}


def routing_means(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the metrics of mixtures of experts.

  Returns:
    penalty, what is added to the mean objective; max_expert_load, the largest
    load over the mean of its layer, in the layer where that is largest; and
    idle_experts, the share of all experts that no token had.
  """
  loads = [x for name, x in sums.items() if name.startswith(LOAD)]
  if not loads:
    return {}
  largest = [jnp.max(x) / jnp.maximum(jnp.mean(x), 1e-9) for x in loads]
  idle = jnp.concatenate([jnp.asarray(x) == 0 for x in loads])
  return dict(
    penalty=sums['penalty'] / jnp.maximum(sums['weight'], 1),
    max_expert_load=jnp.max(jnp.stack(largest)),
    idle_experts=jnp.mean(idle),
  )
