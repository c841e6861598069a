"""What a study compares: read from a config file with `sweep`.

`get_config(arg)` is an ordinary run, `sweep(arg)` what changes over it:

  architectures   name -> changed keys, {'model.pattern': ('deltanet',), ...}
  tasks           name -> changed keys; one nameless task by default
  tests           name -> changed `data.valid_options`, evaluated one by one
  learning_rates, weight_decays, seeds     the grid, one program

An architecture and a task make one program, of all runs of the grid.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from efficient_attn import config as configs
from efficient_attn.config import Config, ConfigError, DataConfig
from efficient_attn.train.grid import Run
from efficient_attn.values import build


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
    published: task -> architecture -> value of the metric in the source.
    band: how far a measured value may be from the published one.
    source: of the published values.
  """

  title: str
  architectures: Mapping[str, Any]
  tasks: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'': {}})
  tests: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {'': {}})
  learning_rates: tuple[float, ...] = (1e-3,)
  weight_decays: tuple[float, ...] = (0.1,)
  seeds: tuple[int, ...] = (0, 1, 2)
  metric: str = 'accuracy'
  match: str = ''
  published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  band: float = 0.0
  source: str = ''

  def __post_init__(self):
    valid = ('', 'params', 'state', 'flops')
    configs.choose('match', self.match, {name: name for name in valid})

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One architecture on one task."""

  task: str
  architecture: str
  config: Config
  tests: Mapping[str, DataConfig]

  @property
  def name(self) -> str:
    """Of what is trained, for people."""
    return '/'.join(filter(None, (self.task, self.architecture)))


def load(path: str, changes: Mapping[str, Any]) -> tuple[dict, Study]:
  """Reads `file.py[:arg]`: the config as a dict, with changes, and its study.

  Changes of keys `sweep.*` are made to the study.
  """
  module, arg = configs.load_module(path)
  values = configs.as_dict(configs.call(module, 'get_config', arg))
  if not hasattr(module, 'sweep'):
    raise ConfigError(f'--config={path!r} has no sweep(): it is not a study')
  of_study = {
    key.removeprefix('sweep.'): value
    for key, value in changes.items()
    if key.startswith('sweep.')
  }
  rest = {k: v for k, v in changes.items() if not k.startswith('sweep.')}
  study = configs.override(configs.call(module, 'sweep', arg), of_study)
  return (
    configs.override(values, rest),
    build(Study, study, 'sweep.'),
  )


def programs(values: Mapping[str, Any], study: Study) -> Iterator[Program]:
  """Yields the programs of a study, unmatched."""
  for task, architecture in itertools.product(study.tasks, study.architectures):
    changes = study.tasks[task] | study.architectures[architecture]
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
