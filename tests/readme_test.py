"""What README.md says can be done as it says."""

import argparse
import importlib.util
import pathlib
import re
import shlex

import pytest

from efficient_attn import cli, config, models
from experiments.ablations import study

ROOT = pathlib.Path(__file__).parents[1]
PAGES = ('README.md', 'experiments/benchmarks/README.md')
QUICKSTART = 'configs/lm/quickstart.py'
FOLDERS = ('launch/', 'configs/', 'experiments/', 'tests/', 'efficient_attn/')


def blocks(language):
  readme = (ROOT / 'README.md').read_text()
  return re.findall(rf'```{language}\n(.*?)```', readme, re.DOTALL)


def commands():
  lines = ''.join(blocks('sh')).replace('\\\n', '').splitlines()
  return [shlex.split(line, comments=True) for line in lines]


def test_the_tables_are_true():
  """Of the rows in them; `launch/table.py --check` also misses new rows."""
  spec = importlib.util.spec_from_file_location('t', ROOT / 'launch/table.py')
  table = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(table)
  readme = table.README.read_text()
  kernels = table.stored_kernels(readme)  # see tests/layers/tpu_test.py
  for name, made in (
    ('methods', table.methods(kernels)),
    ('survey', table.survey()),
  ):
    begin, end = f'<!-- {name} -->', f'<!-- /{name} -->'
    stored = readme.partition(begin)[2].partition(end)[0].strip().splitlines()
    assert len(stored) > 20
    wrong = [line for line in stored if line not in made.splitlines()]
    assert not wrong, 'run python launch/table.py'


@pytest.mark.parametrize('words', commands(), ids=' '.join)
def test_command(words, monkeypatch):
  monkeypatch.chdir(ROOT)
  files = [word.rpartition('=')[2] for word in words]
  files = [file for file in files if file.startswith(FOLDERS)]
  for file in files:
    assert pathlib.Path(file.partition(':')[0]).exists(), file
  flags = [word for word in words if word.startswith('--')]
  changes = [flag for flag in flags if flag.startswith('--config.')]
  configs = [file for file in files if file.startswith('configs/')]
  source = f'--config={[QUICKSTART, *configs][-1]}'
  of_run = [c for c in changes if not c.startswith('--config.sweep.')]
  run, _ = cli.parse_config(argparse.ArgumentParser(), [source, *of_run])
  if 'launch/ablate.py' in words:
    _, changed = cli.parse_changes(argparse.ArgumentParser(), changes)
    study.load(configs[-1], changed)
  models.abstract(run.model)  # mixers know their options
  if words[0] == 'python':
    scripts = (pathlib.Path(words[1]), pathlib.Path(cli.__file__))
    code = ''.join(script.read_text() for script in scripts)
    for flag in set(flags) - set(changes):
      assert f"'{flag.partition('=')[0]}'" in code, flag


def test_the_config_resolves():
  (block,) = blocks('python')
  names = {}
  exec(block, names)
  models.abstract(config.resolve(names['get_config']()).model)


def test_the_example_runs(capsys):
  (block,) = blocks('py')
  exec(block, {})
  assert 'blockwise' in capsys.readouterr().out


@pytest.mark.parametrize('page', PAGES)
def test_links_and_paths_lead_somewhere(page):
  text = (ROOT / page).read_text()
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    near = (ROOT / page).parent / link
    assert link.startswith('https://') or near.exists(), link
  for path in re.findall(r'`([a-z_]+/[^`\s<>*:]+\.\w+)`', text):
    places = (ROOT / path, ROOT / 'efficient_attn' / path)
    assert any(place.exists() for place in places), path
