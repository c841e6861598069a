"""Checks a run before any device starts, and says how large it is.

`config.resolve` has read every value. What is left is known to other modules:
whether names exist, options fit where they go, and model and data fit each
other. `check` resolves all of that once, by building the model without values
and opening the data.
"""

import collections
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable

import jax
import optax

from efficient_attn import config as configs
from efficient_attn import data, sharding
from efficient_attn.config import Config, ConfigError, choose
from efficient_attn.layers.ffns import FFNS, complete_ffn_options
from efficient_attn.layers.mixers import (
  MIXERS,
  choose_mixer,
  complete_options,
)
from efficient_attn.layers.stack import row_of
from efficient_attn.models import cost
from efficient_attn.train import init_from
from efficient_attn.train.load import Run
from efficient_attn.train.machine import host_memory
from efficient_attn.train.objectives import make_objective, objective_of
from efficient_attn.train.optimizer import read_optimizer_options
from efficient_attn.train.state import (
  Architecture,
  TrainState,
  first_state,
)
from efficient_attn.train.teacher import open_teacher
from efficient_attn.train.watch import parse_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
  """A run that can start.

  Attributes:
    config: with all options of its mixers, its optimizer and its data.
    architecture: of the model, in float32 where the dtype is left to the
      device.
    optimizer: of its parameters.
    dataset: opened for one process.
    objective: see `train.objectives`.
    teacher: the run whose model teaches, if there is one.
    source: the run that the parameters come from, if there is one.
    batch: the shapes of a training batch.
    forward_flops: of the products of a forward pass over a batch; None if a
      loop has no known length.
  """

  config: Config
  architecture: Architecture
  optimizer: optax.GradientTransformationExtraArgs
  dataset: data.Data
  objective: Callable
  teacher: Run | None
  source: Run | None
  batch: dict[str, jax.ShapeDtypeStruct]
  forward_flops: float | None


def check(config: Config) -> Checked:
  """Resolves all names and options of a run, and fits its parts together.

  Raises:
    ConfigError: the run cannot work.
  """
  sharding.parse_mesh(config.mesh)
  check_profile(config)
  config = complete(config)
  check_host_memory(config)
  dtype = config.model.dtype or 'float32'
  model = dataclasses.replace(config.model, dtype=dtype)
  architecture = Architecture(model, config.lora, config.optimizer)
  optimizer = architecture.optimizer(config)
  dataset = data.load(
    config.data, batch_size=config.batch_size, seed=config.seed
  )
  check_fit(config, dataset)
  objective = make_objective(config, dataset.tokenizer)
  teacher = open_teacher(config, dataset)
  source = init_from.check(config, architecture)
  params = architecture.abstract_params()
  abstract_state(config, architecture, optimizer)

  def forward(params, batch):
    return objective(architecture.merge(params), batch, None)

  batch = {
    name: jax.ShapeDtypeStruct((config.batch_size, *x.shape), x.dtype)
    for name, x in dataset.example.items()
  }
  try:
    flops = cost.flops(forward, params, batch)
  except cost.UnknownLengthError:
    flops = None
  except NotImplementedError as e:  # a mixer that cannot mix such rows
    raise ConfigError(f'model.pattern={config.model.pattern}: {e}') from e
  return Checked(
    config=config,
    architecture=architecture,
    optimizer=optimizer,
    dataset=dataset,
    objective=objective,
    teacher=teacher,
    source=source,
    batch=batch,
    forward_flops=flops,
  )


def abstract_state(config, architecture, optimizer) -> TrainState:
  """Returns the shapes of the state, on no mesh."""
  params, frozen = architecture.split(architecture.abstract_params())
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(
    functools.partial(first_state, config, optimizer), params, key, frozen
  )


def complete(config: Config) -> Config:
  """Returns the config with every option that it leaves to a default.

  A run then means the same when defaults change.
  """
  mixers, keys = {}, {}
  places = config.model.patterns | {'model.mixers': config.model.mixers}
  for key, names in places.items():
    for name in names:
      keys.setdefault(name, key)
  for name, key in keys.items():
    row = row_of(name)
    choose_mixer(key, row)
    given = config.model.mixers.get(name, {})
    options = complete_options(row, given, f'model.mixers.{name}')
    mixers[name] = configs.as_dict(options)
  ffns = {}
  used = dict.fromkeys(ffn for _, ffn in config.model.layers)
  for name in (*config.model.ffns, *used):
    row = row_of(name)
    choose('model.ffn', row, FFNS)
    given = config.model.ffns.get(name, {})
    options = complete_ffn_options(row, given, f'model.ffns.{name}')
    ffns[name] = configs.as_dict(options)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, mixers=mixers, ffns=ffns),
    optimizer=dataclasses.replace(
      config.optimizer, options=read_optimizer_options(config.optimizer)
    ),
    data=data.complete(config.data),
  )


def check_profile(config: Config) -> None:
  """Raises when the steps to trace are none of the run."""
  if not config.profile_steps:
    return
  first, _ = parse_steps(config.profile_steps)
  if not 1 <= first <= config.steps:
    raise ConfigError(
      f'profile_steps={config.profile_steps!r} begins at step {first}, and the '
      f'run has the steps 1 to {config.steps}'
    )


def check_host_memory(config: Config) -> None:
  """Raises when a batch alone is larger than this machine's memory."""
  if config.data.name != 'text':  # whose rows are as long as one wants
    return
  needed = 12 * config.batch_size * (config.data.seq_len + 1)
  memory = host_memory()
  if needed > memory:
    raise ConfigError(
      f'batch_size={config.batch_size} rows of data.seq_len='
      f'{config.data.seq_len} take {needed / 2**30:.3g} GiB, and this machine '
      f'has {memory / 2**30:.3g} GiB; lower one of them'
    )


def check_fit(config: Config, dataset: data.Data) -> None:
  """Raises when the model cannot read the data."""
  model, size = config.model, dataset.vocab_size
  objective_of(config)  # kinds of model and data
  if config.data.name == 'text' and config.data.packing == 'segments':
    for name in itertools.chain(*model.patterns.values()):
      if not MIXERS[row_of(name)].packing:
        raise ConfigError(
          f"data.packing='segments': {name!r} cannot keep packed sequences "
          "apart; use data.packing='concat' or another mixer"
        )
  if size is not None and model.vocab_size < size:
    key = 'tokenizer' if dataset.tokenizer else 'name'
    added = f' and data.corruption={config.data.corruption!r}'
    raise ConfigError(
      f'model.vocab_size={model.vocab_size} is below the {size} tokens '
      f'of data.{key}={getattr(config.data, key)!r}'
      + added
      * bool(config.data.corruption)
    )
  examples = dataset.example, dataset.valid_example
  for example in examples:
    if model.position == 'learned' and data.row_tokens(example):
      length = data.row_tokens(example)
      if 'targets' in example:
        length = max(length, example['targets'].shape[-1] - 1)
      if length > model.max_len:
        raise ConfigError(
          f'model.max_len={model.max_len} learned positions are fewer than the '
          f'{length} tokens of a row; raise it'
        )
    if 'image' in example:
      shape = example['image'].shape
      if shape != (model.image_size, model.image_size, model.channels):
        raise ConfigError(
          f'model.image_size={model.image_size} and model.channels='
          f'{model.channels}: the images of data.name={config.data.name!r} are '
          f'{" x ".join(map(str, shape))}'
        )
  if (dataset.num_classes or 0) > getattr(model, 'num_classes', math.inf):
    raise ConfigError(
      f'model.num_classes={model.num_classes} is below the '
      f'{dataset.num_classes} classes of data.name={config.data.name!r}'
    )


def report(checked: Checked) -> str:
  """Returns what `--dry-run` prints."""
  config, architecture = checked.config, checked.architecture
  sizes = collections.Counter()
  for name, size in architecture.sizes().items():
    sizes[_module(name)] += size
  total = sum(sizes.values())
  width = max(map(len, sizes))
  lines = [json.dumps(configs.as_dict(config), indent=2), '', 'parameters:']
  lines += [
    f'  {name:{width}} {size:>15,} {size / total:>6.1%}'
    for name, size in sizes.items()
  ]
  lines.append(f'  {"total":{width}} {total:>15,}')
  tokens = data.row_tokens(checked.dataset.example)
  count = config.batch_size * (tokens or 1)
  lines.append(f'a step: {count:,} {"tokens" if tokens else "images"}')
  if checked.dataset.readings is not None:
    lines += map(str, checked.dataset.readings(config.steps))
  if checked.forward_flops is not None:
    lines.append(
      f'a step: {3 * checked.forward_flops:.3g} FLOPs of matrix products, '
      'three forward passes'
    )
  lines += [
    f'memory, {what}: {size / 2**20:,.1f} MiB'
    for what, size in memory(checked).items()
  ]
  lines.append(
    'memory is over all devices; activations are those of a program without '
    'fusion, an upper bound'
  )
  return '\n'.join(lines)


def memory(checked: Checked) -> dict[str, int]:
  """Estimates the bytes of a run over all devices, by what they hold."""
  config, architecture = checked.config, checked.architecture
  state = abstract_state(config, architecture, checked.optimizer)
  rows = config.batch_size // config.accumulate
  batch = {
    name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    for name, x in checked.batch.items()
  }

  def gradient(params, frozen, batch):
    def objective(params):
      model = architecture.merge(params, frozen)
      return checked.objective(model, batch, None)['objective']

    return jax.grad(objective)(params)

  found = {
    'parameters': cost.array_bytes(state.params),
    'frozen parameters': cost.array_bytes(state.frozen),
    'optimizer': cost.array_bytes(state.opt_state),
    'average of the parameters': cost.array_bytes(state.ema),
    'teacher': cost.array_bytes(
      checked.teacher.architecture.abstract_params()
      if checked.teacher
      else state.teacher
    ),
  }
  try:
    found['activations and gradients'] = cost.count(
      gradient, state.params, state.frozen, batch
    ).peak_bytes
  except cost.UnknownLengthError:
    pass
  return {what: size for what, size in found.items() if size}


def _module(name: str) -> str:
  """Returns the part of the model that a parameter belongs to."""
  parts = name.split('.')
  if 'blocks' in parts:  # stack.periods.blocks.0.mixer.qkv.weight
    return '.'.join(parts[: parts.index('blocks') + 3])
  return parts[0]
