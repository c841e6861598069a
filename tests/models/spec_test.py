"""The table of model kinds agrees with the config classes."""

import pathlib
import re
import typing

from efficient_attn import config as configs
from efficient_attn.config import AnyModelConfig
from efficient_attn.models.spec import KINDS

ROOT = pathlib.Path(__file__).parents[2]


def test_each_config_class_is_a_kind():
  classes = typing.get_args(AnyModelConfig)
  assert {kind.name: kind for kind in classes} == {
    name: kind.config for name, kind in KINDS.items()
  }
  for name, kind in KINDS.items():
    config = configs.resolve({'model': {'name': name}}).model
    assert type(config) is kind.config and kind.objectives
    assert kind.unit in ('tokens', 'images')


def test_only_the_table_knows_names_of_kinds():
  for folder in ('efficient_attn', 'experiments', 'launch'):
    for file in (ROOT / folder).rglob('*.py'):
      text = file.read_text()
      assert not re.search(r'model\.name\s*[!=]=', text), file
