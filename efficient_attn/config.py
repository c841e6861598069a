"""What a run is: frozen dataclasses, built once from a config file.

A config file `configs/**/x.py` defines `get_config(arg='')`, which returns an
`ml_collections.ConfigDict` with the keys that differ from the defaults here.
`load` reads it (or a `config.json` saved by a run), `override` applies
`{'model.d_model': 128}`, and `resolve` turns the result into `Config`, where
every key has a value and every value has been checked. A mistake anywhere is a
`ConfigError` of one line that names the key, the value and the remedy.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections


class ConfigError(ValueError):
  """The user's configuration is wrong; the message is meant for the user."""


def nearest(name: str, valid: Iterable[str]) -> str:
  """Returns 'did you mean ...?' or the list of valid names."""
  valid = sorted(valid)
  close = difflib.get_close_matches(str(name), valid, n=1)
  if close:
    return f'did you mean {close[0]!r}?'
  return f'valid: {", ".join(valid)}'


def choose(key: str, name: str, table: Mapping[str, Any]) -> Any:
  """Returns `table[name]`; an unknown name is a `ConfigError` about `key`."""
  if name not in table:
    raise ConfigError(f'{key}={name!r} is unknown; {nearest(name, table)}')
  return table[name]


def _check(ok: bool, key: str, value, remedy: str):
  if not ok:
    raise ConfigError(f'{key}={value!r} must be {remedy}')


def _one_of(key: str, value: str, valid: Iterable[str]):
  choose(key, value, {name: name for name in valid})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """What every model has: a stack of blocks, each a token mixer and an ffn."""

  name: str
  d_model: int = 256
  num_layers: int = 4
  num_heads: int = 4
  # Names of layers.MIXERS, repeated over depth: ('gla', 'gla', 'attention').
  pattern: tuple[str, ...] = ('attention',)
  # Options by mixer, used where the pattern has it:
  # {'attention': {'num_kv_heads': 2}}. A name may end in ':' and a word, to
  # give one row several sets of options: ('window:near', 'window:far').
  mixers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  ffn: str = 'glu'  # layers.FFNS
  ffn_dim: int = 0  # 0: 8/3 d_model for glu, 4 d_model for mlp
  activation: str = 'silu'  # silu with glu is SwiGLU, gelu is GEGLU
  norm: str = 'rmsnorm'  # layers.NORMS
  norm_position: str = 'pre'  # pre | post
  dropout: float = 0.0
  scan_layers: bool = True  # compile one period of the pattern, not all layers
  remat: str = 'none'  # layers.REMAT_POLICIES
  dtype: str = ''  # of activations; '': float32 on CPU, else bfloat16

  def __post_init__(self):
    for key in ('d_model', 'num_layers', 'num_heads'):
      _check(getattr(self, key) > 0, f'model.{key}', getattr(self, key), '> 0')
    if self.d_model % self.num_heads:
      below = self.d_model - self.d_model % self.num_heads
      near = [d for d in (below, below + self.num_heads) if d]
      raise ConfigError(
        f'model.d_model={self.d_model} is not divisible by '
        f'model.num_heads={self.num_heads}; nearest: {near}'
      )
    _check(bool(self.pattern), 'model.pattern', self.pattern, 'one mixer name')
    _one_of('model.norm_position', self.norm_position, ('pre', 'post'))
    _one_of('model.dtype', self.dtype, ('', 'float32', 'bfloat16', 'float64'))
    _check(0 <= self.dropout < 1, 'model.dropout', self.dropout, 'in [0, 1)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(ModelConfig):
  """A causal decoder over tokens."""

  name: str = 'lm'
  vocab_size: int = 256
  # Added to the embeddings; rotary and ALiBi are options of the mixers.
  position: str = 'none'  # none | learned | sinusoidal
  max_len: int = 2048  # rows of the learned positions
  tie_embeddings: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.position in ('rotary', 'alibi'):
      raise ConfigError(
        f'model.position={self.position!r} belongs to the mixer; set '
        f'model.mixers.attention.position={self.position!r}'
      )
    _one_of('model.position', self.position, ('none', 'learned', 'sinusoidal'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
  """A bidirectional encoder over image patches with a classifier."""

  name: str = 'vit'
  image_size: int = 8
  channels: int = 1
  patch_size: int = 2
  num_classes: int = 10
  position: str = 'learned'  # learned | sincos
  pooling: str = 'mean'  # mean | cls

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      raise ConfigError(
        f'model.image_size={self.image_size} is not divisible by '
        f'model.patch_size={self.patch_size}'
      )
    _one_of('model.position', self.position, ('learned', 'sincos'))
    _one_of('model.pooling', self.pooling, ('mean', 'cls'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoEncoderConfig(LMConfig):
  """A decoder whose last vector has to hold the whole sequence."""

  name: str = 'auto_encoder'


MODEL_CONFIGS = {
  'lm': LMConfig,
  'vit': ViTConfig,
  'auto_encoder': AutoEncoderConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where batches come from."""

  name: str = 'text'  # text | digits | a name of data.tasks.TASKS
  # text: '' is the Python standard library's sources; else a file or glob of
  # .txt, .jsonl, .parquet or .array_record, or 'hf:<dataset>[/<subset>]'.
  path: str = ''
  valid_path: str = ''  # '': one document in `valid_every` of `path`
  valid_every: int = 20
  text_key: str = 'text'
  tokenizer: str = 'bytes'  # bytes | a tokenizer.json file
  seq_len: int = 256
  # segments: attention and states stop at document boundaries; concat: not.
  packing: str = 'concat'
  augment: bool = False  # digits: turn, zoom and move a little
  # tasks: {'group': 'S_3'}; those of validation, where they differ; how many
  # examples there are, 0 for new ones without end.
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  valid_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  train_examples: int = 0
  valid_examples: int = 1000
  workers: int = 0  # processes that prepare batches; 0: in this process

  def __post_init__(self):
    _one_of('data.packing', self.packing, ('segments', 'concat'))
    _check(self.seq_len > 0, 'data.seq_len', self.seq_len, '> 0')
    _check(self.valid_every > 1, 'data.valid_every', self.valid_every, '> 1')
    for key in ('train_examples', 'valid_examples'):
      _check(getattr(self, key) >= 0, f'data.{key}', getattr(self, key), '>= 0')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """An optax optimizer and its learning-rate schedule."""

  name: str = 'adamw'  # train.OPTIMIZERS
  learning_rate: float = 1e-3
  schedule: str = 'cosine'  # train.SCHEDULES
  warmup_steps: int = 0
  cooldown: float = 0.2  # wsd: the share of steps that decay
  final_fraction: float = 0.0  # of the learning rate, at the last step
  weight_decay: float = 0.1  # of matrices; never of vectors, gates, norms
  clip_norm: float = 1.0  # 0: no clipping
  # Further arguments of the optax function: {'b2': 0.95}.
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for key in ('cooldown', 'final_fraction'):
      value = getattr(self, key)
      _check(0 <= value <= 1, f'optimizer.{key}', value, 'in [0, 1]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Options of the cross-entropy."""

  label_smoothing: float = 0.0
  z_loss: float = 0.0  # weight of log(Z)^2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole run."""

  model: ModelConfig
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  seed: int = 0
  steps: int = 1000
  batch_size: int = 8  # sequences or images a step, over all devices
  accumulate: int = 1  # micro-batches a step
  ema: float = 0.0  # decay of the averaged parameters; 0: none
  mesh: str = ''  # 'data=2,fsdp=2,tensor=2'; '': every device on data
  cpu_devices: int = 0  # virtual CPU devices; 0: one a core
  log_every: int = 10
  eval_every: int = 0  # 0: at the end only
  eval_batches: int = 0  # 0: the whole validation set
  checkpoint_every: int = 0  # 0: at the end only
  keep_checkpoints: int = 2
  skip_nonfinite: int = 0  # steps in a row to skip before stopping
  profile_steps: str = ''  # '10:15' traces steps 10 to 14

  def __post_init__(self):
    for key in ('steps', 'batch_size', 'accumulate', 'log_every'):
      _check(getattr(self, key) > 0, key, getattr(self, key), '> 0')
    if self.batch_size % self.accumulate:
      raise ConfigError(
        f'batch_size={self.batch_size} is not divisible by '
        f'accumulate={self.accumulate}'
      )


def load(path: str) -> dict[str, Any]:
  """Reads `file.py[:arg]` or the `config.json` of a run into a plain dict."""
  name, _, arg = path.partition(':')
  file = pathlib.Path(name)
  if not file.is_file():
    near = nearest(
      file.name, [p.name for p in file.parent.glob('*.py')] or ['-']
    )
    raise ConfigError(f'--config={name!r}: no such file; {near}')
  if file.suffix == '.json':
    try:
      return json.loads(file.read_text())
    except ValueError as e:
      raise ConfigError(f'--config={name!r} is not JSON: {e}') from None
  return as_dict(load_module(file).get_config(arg))


def load_module(file: pathlib.Path) -> types.ModuleType:
  """Runs a python file and returns what it defines."""
  spec = importlib.util.spec_from_file_location(file.stem, file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def as_dict(values: Any) -> dict[str, Any]:
  """Returns a ConfigDict, mapping or config dataclass as nested plain dicts."""
  if dataclasses.is_dataclass(values):
    values = dataclasses.asdict(values)
  if isinstance(values, ml_collections.ConfigDict):
    values = values.to_dict()
  return {
    k: as_dict(v) if isinstance(v, Mapping) else v for k, v in values.items()
  }


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
  """Builds the checked `Config` from (partial) nested values."""
  values = as_dict(values)
  if not isinstance(values.get('model'), dict):
    raise ConfigError(
      f'model={values.get("model")!r} must be a group of keys, such as '
      "model.name='lm'"
    )
  name = values['model'].get('name', 'lm')
  model = choose('model.name', name, MODEL_CONFIGS)
  return build(Config, values, '', {'model': model})


def save(config: Config, path: pathlib.Path) -> None:
  """Writes the resolved config so that `load` can relaunch the run."""
  new = path.with_suffix('.new')
  new.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
  new.replace(path)  # a kill leaves the old file or the new one


def build(cls, values, prefix, replaced=types.MappingProxyType({})):
  """Builds a dataclass from values whose names and types are checked."""
  hints = typing.get_type_hints(cls) | dict(replaced)
  built = {}
  for key, value in values.items():
    if key not in hints:
      raise ConfigError(
        f'{prefix}{key}={value!r} is not a known key; {nearest(key, hints)}'
      )
    built[key] = _convert(hints[key], value, f'{prefix}{key}')
  return cls(**built)


def _convert(kind, value, key):
  if dataclasses.is_dataclass(kind):
    if not isinstance(value, Mapping):
      raise ConfigError(f'{key}={value!r} must be a group of keys')
    return build(kind, value, f'{key}.')
  if isinstance(value, str) and kind is not str:
    value = _literal(value)
  origin = typing.get_origin(kind) or kind
  if issubclass(origin, Mapping) and isinstance(value, Mapping):
    return _literals(value)
  if origin is tuple and isinstance(value, str):
    value = value.split(',')
  if origin is tuple and isinstance(value, (int, float)):
    value = (value,)  # --config.sweep.seeds=0
  if origin is tuple and isinstance(value, (tuple, list)):
    (item, _) = typing.get_args(kind)
    return tuple(_convert(item, v, f'{key}[{i}]') for i, v in enumerate(value))
  if origin is float and type(value) is int:
    return float(value)
  if type(value) is not origin:
    raise ConfigError(
      f'{key}={value!r} is a {type(value).__name__}; '
      f'it must be of type {origin.__name__}'
    )
  return value


def _literals(options):
  """Reads the strings of free-form options as the literals they may be."""
  if isinstance(options, Mapping):
    return {k: _literals(v) for k, v in options.items()}
  return _literal(options) if isinstance(options, str) else options


def _literal(text):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
