"""Every config file that is shipped can be resolved and built."""

import dataclasses
import pathlib
import re

import pytest

from efficient_attn import config as configs
from efficient_attn import config_files, data, models
from efficient_attn.config import ConfigError
from experiments.ablations import study

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('configs/*/*.py'))
HYBRID = 'configs/lm/hybrid.py'
HYBRIDS = re.findall(r"^  '(\w+)': dict", (ROOT / HYBRID).read_text(), re.M)
ARGUMENTS = [
  f'{HYBRID}:{name}{size}' for name in HYBRIDS for size in ('', ',tiny')
] + ['configs/vit/digits.py:vit', 'configs/lm/classify.py:causal']
STUDIES = [file for file in FILES if file.startswith('configs/ablations/')]
# Without a tiny one, and what the others take beside '' and ':tiny'.
PUBLISHED = {'based'}
OTHERS = {'mqar': [':cell'], 'lm_quality': [':state', ':tiny,state']}


COUNTS = {}


def parameter_count(model):
  """Programs of a study share models, but for the vocabulary."""
  if hasattr(model, 'vocab_size'):
    model = dataclasses.replace(model, vocab_size=256)
  if repr(model) not in COUNTS:
    COUNTS[repr(model)] = models.parameter_count(model)
  return COUNTS[repr(model)]


def test_the_hybrids_were_found():
  assert len(HYBRIDS) == 4


@pytest.mark.parametrize(
  'file',
  [
    file + argument
    for file, stem in ((file, pathlib.Path(file).stem) for file in STUDIES)
    for argument in (
      '',
      *[':tiny'] * (stem not in PUBLISHED),
      *OTHERS.get(stem, ()),
    )
  ],
)
def test_every_program_of_a_study_builds(file):
  values, studied = study.load(str(ROOT / file), {})
  programs = list(study.programs(values, studied))
  names = {program.architecture for program in programs}
  for task, rows in studied.published.items():
    assert task in studied.tasks | studied.groups and set(rows) <= names
  for program in programs:
    assert parameter_count(program.config.model) > 1000
    for config in (program.config.data, *program.tests.values()):
      data.load(config, batch_size=program.config.batch_size)


@pytest.mark.parametrize('file', FILES + ARGUMENTS)
def test_config_builds(file):
  config = configs.resolve(config_files.load(str(ROOT / file)))
  assert models.parameter_count(config.model) > 10_000


def test_unknown_arguments_are_refused():
  study = 'configs/ablations/lm_quality.py'
  for file, argument in (
    (HYBRID, 'gemma'),
    (HYBRID, 'samba,small'),
    (study, 'tiny,stat'),
    *((file, 'tinny') for file in FILES),
  ):
    with pytest.raises(
      ConfigError, match='after the colon|no argument|takes no'
    ):
      config_files.load(str(ROOT / f'{file}:{argument}'))
