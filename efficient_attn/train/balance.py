"""Evens the loads of experts without an objective (Wang et al., 2408.15664).

After each step the correction of an expert falls by `balance_rate` if it had
more tokens than the mean of its layer, and rises if it had fewer. No gradient
leads to a correction; the router puts the excess load of the batch in its
place, so that layers of a scan, micro-batches and devices add up as gradients
do. Optimizers and norms see zeros.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn.layers.router import Router
from efficient_attn.train.groups import flat


def balance_rates(model: nnx.Module) -> dict[str, float]:
  """Returns the rate of each correction, by its path."""
  return {
    '.'.join(map(str, (*path, 'correction'))): module.routing.balance_rate
    for path, module in nnx.iter_modules(model)
    if isinstance(module, Router) and module.correction is not None
  }


def without_excess(grads, rates: Mapping[str, float]):
  """Returns gradients with zeros for corrections, and the excess loads."""
  leaves = flat(grads)
  excess = {name: leaves[name] for name in rates if name in leaves}
  leaves |= jax.tree.map(jnp.zeros_like, excess)
  return jax.tree.unflatten(jax.tree.structure(grads), leaves.values()), excess


def rebalanced(params, excess, rates: Mapping[str, float]):
  """Returns the parameters with corrections moved against the excess."""
  leaves = flat(params)
  leaves |= {
    name: leaves[name] - rates[name] * jnp.sign(x) for name, x in excess.items()
  }
  return jax.tree.unflatten(jax.tree.structure(params), leaves.values())
