"""Loading a directory of weights as a model, and saving a model as one."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from efficient_attn import sharding
from efficient_attn.config import (
  Config,
  ConfigError,
  DataConfig,
  InitConfig,
  LMConfig,
  choose,
)
from efficient_attn.interop import files
from efficient_attn.interop.dialects import translated
from efficient_attn.interop.families import FAMILIES
from efficient_attn.interop.family import Family, differences
from efficient_attn.interop.plan import Plan
from efficient_attn.interop.weights import read_params, write_params
from efficient_attn.models import abstract
from efficient_attn.values import under

HEAD, TABLE = 'unembed.table', 'embed.table'


class Weights:
  """A directory of weights that is open: its model, without the values.

  Args:
    directory: with config.json and safetensors files.
    scan_layers: whether the model scans over its layers.

  Attributes:
    config: of a run that begins with them.
  """

  def __init__(self, directory: str | os.PathLike, scan_layers: bool = True):
    self.directory = path = pathlib.Path(directory).expanduser()
    if not path.is_dir():
      raise ConfigError(f'{path}: there is no such directory')
    words = files.read_json(path / 'config.json')
    with under(f'{path / "config.json"}'):
      words = translated(words)
    tensors = files.open_tensors(path)
    with under(f'{path / "config.json"}'):
      _check_count(words, len(tensors))
      self.family, model = read_words(words)
    model, tensors = _tied_as_file(self.family, model, tensors)
    model = dataclasses.replace(model, scan_layers=scan_layers)
    self.config = Config(
      model=model,
      data=DataConfig(tokenizer=_tokenizer(path)),
      init_from=InitConfig(run=str(path)),
    )
    with under(f'{path / "config.json"}'):
      self._graphdef, state = nnx.split(abstract(model))
    self._flat = {
      '.'.join(map(str, place)): (place, p)
      for place, p in nnx.to_flat_state(state)
    }
    self._plan = Plan(self.family, model, self.shapes())
    with under(f'{path}'):
      _check_dtypes(words, tensors)
      self._tensors = self._plan.find(tensors)

  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the parameters by name."""
    return {
      name: jax.ShapeDtypeStruct(p.shape, p.dtype)
      for name, (_, p) in self._flat.items()
    }

  def flat_params(self, mesh=None, dtype=None) -> dict[str, jax.Array]:
    """Reads the parameters, by name.

    Args:
      mesh: to lay them out on; None: the first device.
      dtype: theirs; None: that of the files.
    """
    like = {}
    for name, (_, p) in self._flat.items():
      place = SingleDeviceSharding(jax.devices()[0])
      if mesh is not None:
        stacked = [None] * (p.ndim - len(p.axes))
        spec = P(*stacked, *sharding.param_spec(p.axes))
        place = NamedSharding(mesh, spec)
      like[name] = jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place)
    with under(f'{self.directory}'):
      return read_params(self._plan, self._tensors, like, dtype)

  def params(self, mesh=None, dtype=None) -> dict[str, Any]:
    """Reads the parameters as the nested dicts of a model."""
    params = self.flat_params(mesh, dtype)
    return traverse_util.unflatten_dict(
      {self._flat[name][0]: x for name, x in params.items()}
    )

  def identity(self) -> str:
    """Returns what differs from other weights."""
    crc = zlib.crc32((self.directory / 'config.json').read_bytes())
    paths = {tensor.path for tensor in self._tensors.values()}
    sizes = sorted((path.name, path.stat().st_size) for path in paths)
    return json.dumps([crc, sizes])

  def model(self, mesh=None) -> nnx.Module:
    """Reads the model."""
    return nnx.merge(self._graphdef, self.params(mesh))


def load(
  directory: str | os.PathLike,
  mesh: jax.sharding.Mesh | None = None,
  *,
  scan_layers: bool = False,
) -> tuple[Config, nnx.Module]:
  """Loads a directory of weights.

  Args:
    directory: as transformers' `save_pretrained` writes it.
    mesh: to lay the parameters out on; None: the first device.
    scan_layers: whether the model scans over its layers. It then compiles
      faster, and decodes slower: XLA copies a layer before it multiplies by it.

  Returns:
    The config of a run that begins with these weights, and the model, whose
    parameters have the dtype of the files.

  Raises:
    ConfigError: no such family, or files that are not a model of it.
  """
  weights = Weights(directory, scan_layers)
  return weights.config, weights.model(mesh)


def save(
  config: Config,
  model: nnx.Module,
  directory: str | os.PathLike,
  *,
  source: str | os.PathLike = '',
) -> None:
  """Saves a model as a directory of weights that transformers loads.

  Args:
    config: of its run.
    model: with the parameters.
    directory: to write, new or empty.
    source: directory of the weights that it began with, whose family, tokenizer
      and licence the new one has; by default `config.init_from.run`. Without
      one the family is the first that has words for the config.

  Raises:
    ConfigError: no family has words for the config.
  """
  path = pathlib.Path(directory).expanduser()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ConfigError(f'{path}: it exists; give a new directory')
  source = pathlib.Path(source or config.init_from.run or os.devnull)
  said = {}
  if files.is_weights(source):
    said = translated(files.read_json(source / 'config.json'))
  name, words = written_words(config.model, said)
  state = nnx.split(model)[1]
  params = {
    '.'.join(map(str, place)): p[...] for place, p in nnx.to_flat_state(state)
  }
  plan = Plan(FAMILIES[name], config.model, params)
  dtypes = {str(x.dtype) for x in params.values()}
  if len(dtypes) == 1:
    words.pop('torch_dtype', None)
    words['dtype'] = dtypes.pop()
  with _whole(path) as unfinished:
    write_params(plan, params, unfinished)
    text = json.dumps(words, indent=2, sort_keys=True)
    (unfinished / 'config.json').write_text(f'{text}\n')
    if said:
      files.copy_companions(source, unfinished)


@contextlib.contextmanager
def _whole(path: pathlib.Path):
  """Yields a folder that gets its name once it is complete."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent)
  except OSError as e:
    raise ConfigError(f'{path}: {e.strerror}') from None
  unfinished = pathlib.Path(unfinished)
  try:
    yield unfinished
    unfinished.chmod(0o755)
    unfinished.rename(path)
  except OSError as e:
    raise ConfigError(f'{path}: {e.strerror}') from None
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def read_words(words: Mapping[str, Any]) -> tuple[Family, LMConfig]:
  """Returns the family and our config of a config.json."""
  if 'model_type' not in words:
    raise ConfigError('it has no model_type')
  family = choose('model_type', words['model_type'], FAMILIES)
  if words.get('quantization_config'):
    raise ConfigError(
      'quantization_config: quantised weights are not read; convert them first'
    )
  return family, family.read(words)


def written_words(
  model: LMConfig, said: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
  """Returns the family and the config.json of a model.

  Args:
    model: its config.
    said: the config.json that it began with, which is kept as far as it still
      holds; {} for none.
  """
  errors = {}
  for name in [said['model_type']] if said else FAMILIES:
    try:
      words = FAMILIES[name].write(model)
    except ConfigError as e:
      errors[name] = e
      continue
    if said and not differences(read_words(said)[1], model):
      return name, dict(said)
    family = FAMILIES[name]
    known = {x for part in family.words for x in part.theirs}
    kept = {key: x for key, x in said.items() if key not in known}
    fixed = dict(model_type=name, architectures=[family.architecture])
    return name, kept | words | fixed
  if len(errors) == 1:
    ((name, error),) = errors.items()
    raise ConfigError(f'{name}: {error}')
  llama = errors['llama']
  raise ConfigError(
    f'no family of {", ".join(FAMILIES)} is this model; llama: {llama}'
  )


def _tied_as_file(family, model, tensors):
  """Returns the config and the tensors, where a head in the file decides.

  Whatever the flag says, a model whose file has a head has one of its own,
  unless it is the table of embeddings.
  """
  rows = {x: row for row in family.ends for x in row.ours}
  if not model.tie_embeddings or HEAD not in rows:
    return model, tensors
  head, table = (
    family.named(rows[x].theirs.split('|'), tensors) for x in (HEAD, TABLE)
  )
  if head is None or table is None:
    return model, tensors
  if tensors[head].shape == tensors[table].shape and np.array_equal(
    tensors[head].map(), tensors[table].map()
  ):
    return model, {k: v for k, v in tensors.items() if k != head}
  return dataclasses.replace(model, tie_embeddings=False), tensors


def _tokenizer(path):
  file = path / 'tokenizer.json'
  return str(file) if file.exists() else 'bytes'


def _check_count(words, tensors):
  """Refuses more layers than there are tensors before any is described."""
  for name in ('num_hidden_layers', 'n_layer', 'num_layers'):
    count = words.get(name)
    if isinstance(count, int) and count > tensors:
      raise ConfigError(f'{name}={count}, but the files hold {tensors} tensors')


def _check_dtypes(words, tensors):
  said = words.get('dtype') or words.get('torch_dtype')
  for name, tensor in tensors.items():
    if said and str(tensor.dtype) not in (str(said), 'float32'):
      raise ConfigError(
        f'{name} is {tensor.dtype}, but config.json says dtype={said!r}'
      )
