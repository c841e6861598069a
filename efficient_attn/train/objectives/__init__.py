"""Objectives: what a model is trained on.

  objective(model, batch, key, teacher=None) -> sums

Sums over the batch (see `sums.means`), of which 'objective' has a gradient. A
teacher is another model that reads the same batch; its divergence is added to
the objective as `config.teacher` says.
"""

from collections.abc import Callable

from efficient_attn.config import Config, ConfigError
from efficient_attn.data import Tokenizer, kind_of
from efficient_attn.models.spec import KINDS
from efficient_attn.train.objectives.classes import classification
from efficient_attn.train.objectives.tokens import (
  answers,
  every_answer,
  masked_tokens,
  next_token,
  target_tokens,
)

# Each is called with the config and the bytes of each token (None: unknown).
OBJECTIVES = {
  'next_token': next_token,
  'answers': answers,
  'every_answer': every_answer,
  'masked_tokens': masked_tokens,
  'target_tokens': target_tokens,
  'classification': classification,
}


def objective_of(config: Config) -> str:
  """Returns the name of the objective of a model on its data.

  Raises:
    ConfigError: a model of this kind does not read such data.
  """
  model, name = config.model.name, config.data.name
  kind = kind_of(config.data)
  if kind not in KINDS[model].objectives:
    able = [name for name, row in KINDS.items() if kind in row.objectives]
    raise ConfigError(
      f'model.name={model!r} does not read data.name={name!r} ({kind}); use '
      f'model.name={" or ".join(map(repr, able))}, or other data'
    )
  return KINDS[model].objectives[kind]


def make_objective(
  config: Config, tokenizer: Tokenizer | None = None
) -> Callable:
  """Returns the objective of a model on its data; see `objective_of`."""
  make = OBJECTIVES[objective_of(config)]
  return make(config, tokenizer and tokenizer.token_bytes)
