"""The state of a run: what a step maps to the next, and how it is laid out."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from efficient_attn import sharding
from efficient_attn.config import (
  Config,
  ConfigError,
  LoraConfig,
  ModelConfig,
  OptimizerConfig,
)
from efficient_attn.layers.adapter import adapt
from efficient_attn.layers.param import matrices_apart
from efficient_attn.models import build, jit_init
from efficient_attn.train.balance import balance_rates
from efficient_attn.train.groups import FROZEN, group_of_each
from efficient_attn.train.optimizer import make_optimizer

Params = dict[str, Any]  # nested dicts of arrays, as in nnx.to_pure_dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step reads and changes.

  Attributes:
    step: int32, the number of steps done.
    params: the parameters that are trained, float32.
    opt_state: of the optax optimizer.
    ema: the averaged parameters, or None.
    key: PRNG key of the run; step i folds i into it.
    frozen: the parameters that are not trained, which no checkpoint holds.
    teacher: the parameters of a teacher, or None.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  ema: Params | None
  key: jax.Array
  frozen: Params = dataclasses.field(default_factory=dict)
  teacher: Params | None = None


class Architecture:
  """A model without its values: structure, shapes and parameter metadata.

  Args:
    config: of the model.
    lora: its adapters; None: it has none.
    optimizer: whose groups say what is frozen or trained apart; None: nothing.
  """

  def __init__(
    self,
    config: ModelConfig,
    lora: LoraConfig | None = None,
    optimizer: OptimizerConfig | None = None,
  ):
    self.config, self.lora = config, lora or LoraConfig()
    model = nnx.eval_shape(lambda: self._build(nnx.Rngs(0)))
    self.balance_rates = balance_rates(model)
    self.graphdef, self._params = nnx.split(model)
    self.groups = group_of_each(
      self.sizes(), optimizer or OptimizerConfig(), bool(self.lora.rank)
    )

  def _build(self, rngs):
    model = build(self.config, rngs=rngs)
    if self.lora.rank:
      adapt(model, self.lora, rngs=rngs)
    return model

  def merge(self, params: Params, frozen: Params | None = None) -> nnx.Module:
    """Returns the model with these parameters."""
    return nnx.merge(self.graphdef, joined(params, frozen or {}))

  def split(self, tree: Any) -> tuple[Any, Any]:
    """Splits a tree like all parameters into the trained and the frozen."""
    leaves = traverse_util.flatten_dict(tree)
    frozen = {
      path for path in leaves if self.groups['.'.join(map(str, path))] is FROZEN
    }
    parts = (
      {path: leaves[path] for path in leaves if (path in frozen) == chosen}
      for chosen in (False, True)
    )
    return tuple(map(traverse_util.unflatten_dict, parts))

  def initial_params(self, key: jax.Array) -> Params:
    """Returns new values of all parameters."""
    return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(key))))

  def abstract_params(self) -> Params:
    """Returns the shapes and dtypes of all parameters."""
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
      stacked = matrices_apart(p)
      middle = stacked + p.inputs
      return MuonDimensionNumbers(
        tuple(range(stacked, middle)), tuple(range(middle, p.ndim))
      )

    return make_optimizer(
      config.optimizer,
      config.steps,
      self.split(self.map(lambda _, p: p.weight_decay))[0],
      self.split(self.map(matrix))[0],
      {name: g for name, g in self.groups.items() if g is not FROZEN},
    )

  def abstract_state(
    self, config: Config, optimizer, mesh, teacher: 'Architecture | None' = None
  ) -> TrainState:
    """Returns the state as shapes, dtypes and shardings."""
    replicated = NamedSharding(mesh, P())

    def as_abstract(x, place):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def placed(architecture):
      return jax.tree.map(
        as_abstract,
        architecture.abstract_params(),
        architecture.shardings(mesh),
      )

    key = jax.eval_shape(lambda: jax.random.key(config.seed))
    params, frozen = self.split(placed(self))
    with jax.set_mesh(mesh):
      state = jax.eval_shape(
        functools.partial(first_state, config, optimizer),
        params,
        as_abstract(key, replicated),
        frozen,
        teacher and placed(teacher),
      )
    return jax.tree.map(
      lambda x: as_abstract(x, x.sharding or replicated), state
    )

  def init(self, config: Config, optimizer, mesh, given=None, teacher=None):
    """Creates the state of step 0, each array in its place on the mesh.

    Args:
      config: of the run.
      optimizer: of the run.
      mesh: to lay it out on.
      given: from all parameters, in place, to those that the run begins with.
      teacher: the parameters of a teacher that is no average, in place.
    """
    key = jax.random.key(config.seed)
    # Outside of the mesh, so that XLA may spread the drawing itself.
    with jax.set_mesh(None):
      params = jit_init(
        self.initial_params, mesh, out_shardings=self.shardings(mesh)
      )(key)
    if given is not None:
      params = given(params)
    params, frozen = self.split(params)
    with jax.set_mesh(mesh):
      key = jax.device_put(key, NamedSharding(mesh, P()))
      state = jax.jit(functools.partial(first_state, config, optimizer))(
        params, key
      )
    if teacher is None:
      teacher = state.teacher
    return dataclasses.replace(state, frozen=frozen, teacher=teacher)


def first_state(
  config: Config, optimizer, params, key, frozen=None, teacher=None
) -> TrainState:
  """Returns the state before step 1."""
  if config.teacher.momentum:
    teacher = jax.tree.map(jnp.copy, params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    ema=jax.tree.map(jnp.copy, params) if config.ema else None,
    key=key,
    frozen=frozen or {},
    teacher=teacher,
  )


def changing(state: TrainState, config: Config) -> TrainState:
  """Returns what checkpoints hold: nothing that no step changes."""
  teacher = state.teacher if config.teacher.momentum else None
  return dataclasses.replace(state, frozen={}, teacher=teacher)


def joined(params: Params, frozen: Params) -> Params:
  """Joins the two parts of `Architecture.split`."""
  if not frozen:
    return params
  flat = map(traverse_util.flatten_dict, (params, frozen))
  return traverse_util.unflatten_dict(dict(collections.ChainMap(*flat)))


def nested(params: dict[str, jax.Array]) -> Params:
  """Returns parameters by path as the nested dicts of a model.

  Numbers in a path are those of lists.
  """

  def part(name):
    return int(name) if name.isdigit() else name

  return traverse_util.unflatten_dict(
    {tuple(map(part, name.split('.'))): x for name, x in params.items()}
  )
