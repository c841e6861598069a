"""Every config file that is shipped can be resolved and built."""

import pathlib

import pytest

from efficient_attn import config as configs
from efficient_attn import models

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/*/*.py'))
TINY = [f'{f}:tiny' for f in FILES if "'tiny'" in (ROOT / f).read_text()]


@pytest.mark.parametrize('file', FILES + TINY)
def test_config_builds(file):
  config = configs.resolve(configs.load(str(ROOT / file)))
  assert models.parameter_count(config.model) > 10_000


@pytest.mark.parametrize('file', TINY)
def test_unknown_arguments_are_refused(file):
  with pytest.raises(ValueError, match='unknown argument'):
    configs.load(str(ROOT / file.replace(':tiny', ':small')))
