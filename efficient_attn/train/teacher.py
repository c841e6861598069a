"""A teacher that is another run, as `config.teacher` says."""

import dataclasses

from efficient_attn.config import Config, ConfigError
from efficient_attn.data import Data, load_tokenizer
from efficient_attn.train.load import Run, open_run
from efficient_attn.train.objectives import objective_of


def open_teacher(config: Config, dataset: Data) -> Run | None:
  """Opens the run of a teacher, if there is one.

  Raises:
    ConfigError: it does not read the same batches as the model.
  """
  name = config.teacher.run
  if not name:
    return None
  run = open_run(name, 'teacher.run')
  run.identity()  # it has a checkpoint
  theirs = dataclasses.replace(config, model=run.config.model)
  if objective_of(config) != objective_of(theirs):
    raise ConfigError(
      f'teacher.run={name!r} is a {run.config.model.name}, which is not trained'
      f' as a {config.model.name} is on data.name={config.data.name!r}; use a '
      'teacher of the same kind'
    )
  if dataset.tokenizer is not None:
    other = run.config.data.tokenizer
    if load_tokenizer(other).fingerprint != dataset.tokenizer.fingerprint:
      raise ConfigError(
        f'teacher.run={name!r} reads data.tokenizer={other!r} and this run '
        f'{config.data.tokenizer!r}; use the same'
      )
  return run
