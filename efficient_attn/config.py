"""What a run is: frozen dataclasses, built once from a config file.

A config file `configs/**/x.py` defines `get_config(arg='')`, which returns an
`ml_collections.ConfigDict` with the keys that differ from the defaults here.
`config_files.load` reads it (or a `config.json` saved by a run), `override`
applies `{'model.d_model': 128}`, and `resolve` turns the result into `Config`,
where every key has a value of its type and within its range.
`train.check.check` then resolves the names: it builds the model and opens the
data, without a device. A mistake anywhere is a `ConfigError` of one line that
names the key, the value and the remedy.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from efficient_attn.model_config import (
  AnyModelConfig,
  AutoEncoderConfig,
  ClassifierConfig,
  EmbeddingConfig,
  EncoderConfig,
  EncoderDecoderConfig,
  LMConfig,
  LogitsConfig,
  ModelConfig,
  ViTConfig,
)
from efficient_attn.values import (
  LARGEST,
  BelowOne,
  ConfigError,
  Fraction,
  Group,
  NonNegative,
  NonNegativeFloat,
  OneOf,
  Positive,
  PositiveFloat,
  Range,
  Seed,
  as_dict,
  build_group,
  choose,
)

__all__ = [
  'AnyModelConfig',
  'AutoEncoderConfig',
  'ClassifierConfig',
  'Config',
  'ConfigError',
  'DataConfig',
  'EmbeddingConfig',
  'EncoderConfig',
  'EncoderDecoderConfig',
  'LMConfig',
  'LogitsConfig',
  'LossConfig',
  'ModelConfig',
  'OptimizerConfig',
  'TeacherConfig',
  'ViTConfig',
  'as_dict',
  'choose',
  'override',
  'resolve',
  'words',
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Group):
  """Where batches come from."""

  name: str = 'text'  # text | digits | pixels | a name of data.tasks.TASKS
  # text: '' is the Python standard library's sources; else a file or glob of
  # .txt, .jsonl, .parquet or .array_record, or 'hf:<dataset>[/<subset>]'.
  path: str = ''
  valid_path: str = ''  # '': one document in `valid_every` of `path`
  valid_every: Annotated[int, Range(2, LARGEST)] = 20
  # Instead of path: {'code': {'path': 'a/*.txt', 'weight': 0.7}, 'wiki': {..}}.
  mixture: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Of records: the text or its token ids, and the class of each, '' for none.
  text_key: str = 'text'
  label_key: str = ''
  tokenizer: str = 'bytes'  # bytes | a tokenizer.json file
  seq_len: Positive = 256
  # segments: attention and states stop at document boundaries; concat: not.
  packing: Annotated[str, OneOf(('segments', 'concat'))] = 'concat'
  # Text to restore, as BERT or T5: the share of tokens, the mean span.
  corruption: Annotated[str, OneOf(('', 'mask', 'spans'))] = ''
  corruption_rate: Annotated[float, Range(0, 0.95, above=True)] = 0.15
  span_length: Annotated[float, Range(1)] = 3.0
  augment: bool = False  # digits: turn, zoom and move a little
  # tasks: {'group': 'S_3'}; those of validation, where they differ; how many
  # examples there are, 0 for new ones without end.
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  valid_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train_examples: NonNegative = 0
  valid_examples: Positive = 1000
  # Processes that prepare batches; 0: in this process.
  workers: Annotated[int, Range(0, 1024)] = 0

  prefix = 'data.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig(Group):
  """Parameters that differ in what the optimizer does; None: as the others."""

  match: tuple[str, ...] = ()  # of their paths, as 'stack.*.mixer.*'
  frozen: bool = False
  learning_rate: PositiveFloat | None = None
  schedule: str | None = None
  warmup_steps: NonNegative | None = None
  weight_decay: NonNegativeFloat | None = None

  prefix = 'optimizer.groups.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Group):
  """An optax optimizer and its learning-rate schedule."""

  name: str = 'adamw'  # train.OPTIMIZERS
  learning_rate: PositiveFloat = 1e-3
  schedule: str = 'cosine'  # train.SCHEDULES
  warmup_steps: NonNegative = 0
  cooldown: Fraction = 0.2  # wsd: the share of steps that decay
  final_fraction: Fraction = 0.0  # of the learning rate, at the last step
  # Of matrices; never of vectors, gates, norms.
  weight_decay: NonNegativeFloat = 0.1
  clip_norm: NonNegativeFloat = 1.0  # 0: no clipping
  # Further arguments of the optax function: {'b2': 0.95}.
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Parameters that are trained otherwise, or not at all: {'embeddings':
  # {'match': ('embed.*',), 'learning_rate': 1e-4}}.
  groups: Mapping[str, GroupConfig] = dataclasses.field(default_factory=dict)

  prefix = 'optimizer.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Group):
  """Options of the cross-entropy."""

  label_smoothing: BelowOne = 0.0
  z_loss: NonNegativeFloat = 0.0  # weight of log(Z)^2

  prefix = 'loss.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(Group):
  """The run whose parameters are those of step 0.

  A parameter that only one of the models has, or that has another shape, is an
  error unless a pattern names it, as '*.mixer.*'. Layers are counted, so that
  another pattern or `scan_layers` keeps what both models have.
  """

  # Its workdir, or a directory of weights (see interop); '': initial values.
  run: str = ''
  new: tuple[str, ...] = ()  # that this model alone has: initial values
  unused: tuple[str, ...] = ()  # that the run alone has
  # Of another shape: what both have room for is taken over, as the rows of a
  # longer table of positions; the rest has initial values.
  resized: tuple[str, ...] = ()

  prefix = 'init_from.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Group):
  """Low-rank adapters, beside which nothing is trained but optimizer.groups."""

  rank: NonNegative = 0  # 0: none
  alpha: PositiveFloat = 16.0
  match: tuple[str, ...] = ('*.mixer.*',)  # paths of projections

  prefix = 'lora.'

  @property
  def scale(self) -> float:
    """The factor of the update."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(Group):
  """Another model of the same data, whose logits the model learns, too.

  (1 - weight) objective + weight T^2 KL(teacher / T || logits / T)
  """

  run: str = ''  # workdir of a trained model; '': no such teacher
  # Decay of the average of the model itself as its teacher; 0: none. It rises
  # to 1 along half a cosine, as in BYOL (2006.07733).
  momentum: BelowOne = 0.0
  weight: Fraction = 0.5
  temperature: PositiveFloat = 1.0  # T above

  prefix = 'teacher.'

  def __post_init__(self):
    super().__post_init__()
    if self.run and self.momentum:
      raise ConfigError(
        f'teacher.run={self.run!r} and teacher.momentum={self.momentum} are two'
        ' teachers; drop one'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Group):
  """A whole run."""

  model: AnyModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  teacher: TeacherConfig = TeacherConfig()
  init_from: InitConfig = InitConfig()
  lora: LoraConfig = LoraConfig()
  seed: Seed = 0
  steps: Positive = 1000
  # Sequences or images a step, over all devices.
  batch_size: Annotated[int, Range(1, 2**20)] = 8
  accumulate: Positive = 1  # micro-batches a step
  ema: BelowOne = 0.0  # decay of the averaged parameters; 0: none
  mesh: str = ''  # 'data=2,fsdp=2,tensor=2'; '': every device on data
  # Virtual CPU devices; 0: one a core.
  cpu_devices: Annotated[int, Range(0, 1024)] = 0
  log_every: Positive = 10
  eval_every: NonNegative = 0  # 0: at the end only
  eval_batches: NonNegative = 0  # 0: the whole validation set
  checkpoint_every: NonNegative = 0  # 0: at the end only
  keep_checkpoints: Positive = 2
  skip_nonfinite: NonNegative = 0  # steps in a row to skip before stopping
  profile_steps: str = ''  # '10:15' traces steps 10 to 14

  prefix = ''

  def __post_init__(self):
    super().__post_init__()
    if self.batch_size % self.accumulate:
      raise ConfigError(
        f'batch_size={self.batch_size} is not divisible by '
        f'accumulate={self.accumulate}'
      )


def words(arg: str, *valid: str) -> set[str]:
  """Returns the words behind the colon of --config=file.py:tiny,state.

  Raises:
    ConfigError: one of them is not valid.
  """
  found = [word.strip() for word in arg.split(',') if word.strip()]
  if found and not valid:
    raise ConfigError(f'--config=...:{arg}: this config takes no argument')
  for word in found:
    choose(
      'the argument after the colon of --config', word, dict.fromkeys(valid)
    )
  return set(found)


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict:
  """Returns `values` with dotted keys changed: {'model.d_model': '128'}.

  A value may be a string, as from a command line; `resolve` reads it.
  """
  values = as_dict(values)
  for dotted, value in changes.items():
    *parents, last = dotted.split('.')
    node = values
    for parent in parents:
      node = node.setdefault(parent, {})
      if not isinstance(node, dict):
        raise ConfigError(f'{dotted}={value!r}: {parent} has no keys below it')
    node[last] = value
  return values


def resolve(values: Mapping[str, Any]) -> Config:
  """Builds the `Config` from (partial) nested values, each of them checked.

  Options of mixers, optimizers and tasks keep the form that they have: their
  types are known where they go, and `train.check.check` reads them there.
  """
  values = as_dict(values)
  model = values.get('model')
  if not isinstance(model, dict):
    raise ConfigError(
      f"model={model!r} must be a group of keys, such as model.name='lm'"
    )
  kinds = {kind.name: kind for kind in typing.get_args(AnyModelConfig)}
  kind = choose('model.name', model.get('name', 'lm'), kinds)
  return build_group(Config, values, '', {'model': kind})
