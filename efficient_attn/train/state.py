"""The state of a run: what a step maps to the next, and how it is laid out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from efficient_attn import sharding
from efficient_attn.config import Config, ConfigError, ModelConfig
from efficient_attn.models import abstract, build, jit_init
from efficient_attn.train.optimizer import make_optimizer

Params = dict[str, Any]  # nested dicts of arrays, as in nnx.to_pure_dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step changes.

  Attributes:
    step: int32, the number of steps done.
    params: the model's parameters, float32.
    opt_state: of the optax optimizer.
    ema: the averaged parameters, or None.
    key: PRNG key of the run; step i folds i into it.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  ema: Params | None
  key: jax.Array


class Architecture:
  """A model without its values: structure, shapes and parameter metadata."""

  def __init__(self, config: ModelConfig):
    self.config = config
    self.graphdef, self._params = nnx.split(abstract(config))

  def merge(self, params: Params) -> nnx.Module:
    """Returns the model with these parameters."""
    return nnx.merge(self.graphdef, params)

  def initial_params(self, key: jax.Array) -> Params:
    """Returns new parameters."""
    model = build(self.config, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model))

  def abstract_params(self) -> Params:
    """Returns the shapes and dtypes of the parameters."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
      nnx.to_pure_dict(self._params),
    )

  def sizes(self) -> dict[str, int]:
    """Returns the number of elements of each parameter, by its name."""
    flat = nnx.to_flat_state(self._params)
    return {'.'.join(map(str, path)): p.size for path, p in flat}

  def map(self, f) -> Any:
    """Returns a tree like the parameters of f(name, parameter metadata)."""
    flat = nnx.to_flat_state(self._params)
    found = [(path, f('.'.join(map(str, path)), p)) for path, p in flat]
    return nnx.to_pure_dict(
      nnx.from_flat_state(found), extract_fn=lambda leaf: leaf
    )

  def shardings(self, mesh: jax.sharding.Mesh) -> Any:
    """Returns where each parameter is stored.

    Raises:
      ConfigError: a mesh axis does not divide the dimension that it shards.
    """

    def place(name, p):
      spec = sharding.param_spec(p.axes)
      stacked = p.ndim - len(p.axes)  # the layers of a scanned stack
      for size, axis, mesh_axis in zip(
        p.shape[stacked:], p.axes, spec, strict=True
      ):
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
          raise ConfigError(
            f'mesh: {mesh_axis}={mesh.shape[mesh_axis]} does not divide the '
            f'{axis} dimension of {name}, which is {size}'
          )
      return NamedSharding(mesh, P(*[None] * stacked, *spec))

    return self.map(place)

  def optimizer(self, config: Config):
    """Builds the run's optimizer, which is told what each parameter is."""

    def matrix(_, p):
      if not p.inputs:
        return None
      stacked = p.ndim - len(p.axes)
      middle = stacked + p.inputs
      return MuonDimensionNumbers(
        tuple(range(stacked, middle)), tuple(range(middle, p.ndim))
      )

    return make_optimizer(
      config.optimizer,
      config.steps,
      self.map(lambda _, p: p.weight_decay),
      self.map(matrix),
    )

  def abstract_state(self, config: Config, optimizer, mesh) -> TrainState:
    """Returns the state as shapes, dtypes and shardings."""
    replicated = NamedSharding(mesh, P())

    def as_abstract(x, place):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    params = jax.tree.map(
      as_abstract, nnx.to_pure_dict(self._params), self.shardings(mesh)
    )
    key = jax.eval_shape(lambda: jax.random.key(config.seed))
    with jax.set_mesh(mesh):
      state = jax.eval_shape(
        lambda params, key: first_state(config, optimizer, params, key),
        params,
        as_abstract(key, replicated),
      )
    return jax.tree.map(
      lambda x: as_abstract(x, x.sharding or replicated), state
    )

  def init(self, config: Config, optimizer, mesh) -> TrainState:
    """Creates the state of step 0, each array in its place on the mesh."""
    key = jax.random.key(config.seed)
    # Outside of the mesh, so that XLA may spread the drawing itself.
    with jax.set_mesh(None):
      params = jit_init(
        self.initial_params, out_shardings=self.shardings(mesh)
      )(key)
    with jax.set_mesh(mesh):
      key = jax.device_put(key, NamedSharding(mesh, P()))
      return jax.jit(
        lambda params, key: first_state(config, optimizer, params, key)
      )(params, key)


def first_state(config: Config, optimizer, params, key) -> TrainState:
  """Returns the state before step 1."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if config.ema else None,
    key=key,
  )
