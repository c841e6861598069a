"""Lloyd's k-means, with a start that needs no random numbers."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops.products import product


def kmeans(
  points: Float[Array, '*batch P H'], clusters: int, iterations: int = 10
) -> tuple[Int[Array, '*batch P'], Float[Array, '*batch C H']]:
  """Returns the cluster of every point, and the centres.

  Starts from the first point and, one by one, the point farthest from those
  before it; a cluster that loses all its points keeps its centre.
  """
  one = functools.partial(_one, clusters=clusters, iterations=iterations)
  return jnp.vectorize(one, signature='(p,h)->(p),(c,h)')(points)


def _one(points, clusters, iterations):
  def distances(centre):
    return jnp.square(points - centre).sum(-1)

  def farthest(nearest, _):
    new = points[jnp.argmax(nearest)]
    return jnp.minimum(nearest, distances(new)), new

  start = points[0]
  _, more = lax.scan(farthest, distances(start), length=clusters - 1)
  centres = jnp.concatenate([start[None], more])

  def assign(centres):
    return jnp.argmin(jax.vmap(distances)(centres), axis=0)

  def update(_, centres):
    member = jax.nn.one_hot(assign(centres), clusters, dtype=points.dtype).T
    size = member.sum(-1, keepdims=True)
    sums = product('cp,ph->ch', member, points).astype(points.dtype)
    return jnp.where(size > 0, sums / jnp.maximum(size, 1), centres)

  centres = lax.fori_loop(0, iterations, update, centres)
  return assign(centres), centres
