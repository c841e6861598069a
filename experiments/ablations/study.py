"""What a study compares: read from a config file with `sweep`.

`get_config(arg)` is an ordinary run, `sweep(arg)` what changes over it:

  architectures   name -> changed keys, {'model.pattern': ('deltanet',), ...}
  tasks           name -> changed keys; one nameless task by default
  tests           name -> changed `data.valid_options`, evaluated one by one
  learning_rates, weight_decays, seeds     the grid, one program

An architecture and a task make one program, of all runs of the grid.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from efficient_attn import config as configs
from efficient_attn import config_files
from efficient_attn.config import Config, ConfigError, DataConfig, choose
from efficient_attn.train.grid import Run
from efficient_attn.values import (
  NonNegativeFloat,
  OneOf,
  PositiveFloat,
  Seed,
  build_group,
)
from experiments import page


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
  """What `sweep` returns.

  Attributes:
    title: of the report.
    architectures: name -> changed keys of the config.
    tasks: name -> changed keys of the config.
    tests: name -> changed options of the validation data.
    learning_rates: of the grid.
    weight_decays: of the grid.
    seeds: of the grid; intervals are over them.
    metric: of the validation, the higher the better unless it is a loss.
    match: params, state or flops: every architecture gets the width that comes
      nearest to the first one's; '': as configured.
    groups: name -> tasks whose mean is the score, as in MAD; they share one
      table.
    published: task or group -> architecture -> value of the metric in the
      source.
    band: how far a measured value may be from the published one; 0 where the
      protocols differ too much for a judgement.
    source: of the published values.
  """

  title: str
  architectures: Mapping[str, Any]
  tasks: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'': {}})
  tests: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'': {}})
  learning_rates: tuple[PositiveFloat, ...] = (1e-3,)
  weight_decays: tuple[NonNegativeFloat, ...] = (0.1,)
  seeds: tuple[Seed, ...] = (0, 1, 2)
  metric: str = 'accuracy'
  match: Annotated[str, OneOf(('', 'params', 'state', 'flops'))] = ''
  groups: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  published: Mapping[str, Mapping[str, float]] = dataclasses.field(
    default_factory=dict
  )
  band: NonNegativeFloat = 0.0
  source: str = ''

  def __post_init__(self):
    for key in ('architectures', 'tasks', 'tests'):
      _check_names(f'sweep.{key}', getattr(self, key))
    for name, tasks in self.groups.items():
      for task in tasks:
        choose(f'sweep.groups.{name}', task, self.tasks)
    for key in ('learning_rates', 'weight_decays', 'seeds'):
      values = getattr(self, key)
      if not values or len(set(values)) < len(values):
        raise ConfigError(
          f'sweep.{key}={values} must be one value or more, each once'
        )

  @property
  def runs(self) -> list[Run]:
    """The grid."""
    grid = itertools.product(
      self.learning_rates, self.weight_decays, self.seeds
    )
    return [
      Run(learning_rate=lr, weight_decay=decay, seed=seed)
      for lr, decay, seed in grid
    ]


def _check_names(key: str, groups: Mapping[str, Any]) -> None:
  if not groups:
    raise ConfigError(f'{key}={groups} is empty; give one or more by name')
  for name, changes in groups.items():
    if not isinstance(changes, Mapping):
      raise ConfigError(
        f'{key}: {name!r} is {changes!r}; it must be the changed keys, as in '
        "{'model.d_model': 64}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One architecture on one task."""

  task: str
  architecture: str
  config: Config
  tests: Mapping[str, DataConfig]

  @property
  def name(self) -> str:
    """Of what is trained, for people: one line."""
    return page.Name('/'.join(filter(None, (self.task, self.architecture))))


def load(path: str, changes: Mapping[str, Any]) -> tuple[dict, Study]:
  """Reads `file.py[:arg]`: the config as a dict, with changes, and its study.

  Changes of keys `sweep.*` are made to the study.
  """
  module, arg = config_files.load_module(path)
  values = configs.as_dict(config_files.call(module, 'get_config', arg))
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'--config={path!r} has no sweep(): it is not a study')
  of_study = {
    key.removeprefix('sweep.'): value
    for key, value in changes.items()
    if key.startswith('sweep.')
  }
  rest = {k: v for k, v in changes.items() if not k.startswith('sweep.')}
  study = configs.override(config_files.call(module, 'sweep', arg), of_study)
  return (
    configs.override(values, rest),
    build_group(Study, study, 'sweep.'),
  )


@contextlib.contextmanager
def naming(task: str, architecture: str) -> Iterator[None]:
  """Adds the task and the architecture to what is wrong with them."""
  try:
    yield
  except ConfigError as e:
    name = page.Name('/'.join(filter(None, (task, architecture))))
    raise ConfigError(f'{name}: {e}') from None


def programs(values: Mapping[str, Any], study: Study) -> Iterator[Program]:
  """Yields the programs of a study, unmatched."""
  for task, architecture in itertools.product(study.tasks, study.architectures):
    changes = study.tasks[task] | study.architectures[architecture]
    with naming(task, architecture):
      config = configs.resolve(configs.override(values, changes))
    tests = {
      name: dataclasses.replace(
        config.data, valid_options=config.data.valid_options | options
      )
      for name, options in study.tests.items()
    }
    yield Program(
      task=task, architecture=architecture, config=config, tests=tests
    )
