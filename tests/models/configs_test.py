"""Every config file that is shipped can be resolved and built."""

import pathlib
import re

import pytest

from efficient_attn import config as configs
from efficient_attn import models

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/*/*.py'))
HYBRIDS = re.findall(r"^  '(\w+)': dict", (ROOT / FILES[0]).read_text(), re.M)
ARGUMENTS = [
  f'{FILES[0]}:{name}{size}' for name in HYBRIDS for size in ('', ',tiny')
]


def test_the_hybrids_were_found():
  assert FILES[0] == 'configs/lm/hybrid.py' and len(HYBRIDS) == 4


@pytest.mark.parametrize('file', FILES + ARGUMENTS)
def test_config_builds(file):
  config = configs.resolve(configs.load(str(ROOT / file)))
  assert models.parameter_count(config.model) > 10_000


def test_unknown_arguments_are_refused():
  for argument in ('gemma', 'samba,small'):
    with pytest.raises(ValueError, match='unknown argument'):
      configs.load(str(ROOT / f'{FILES[0]}:{argument}'))
