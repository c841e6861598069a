"""setup.sh installs once: what is there already, and whole, is used."""

import os
import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Stand-ins for two Pythons and for uv, which notes what it is asked for.
PYTHON = """#!/usr/bin/env bash
case $1 in
  --version) echo "Python {version}" ;;
  -c) exit {old} ;;
esac
"""
UV = """#!/usr/bin/env bash
echo "$*" >> "$SAID"
[[ -z ${PAUSE:-} ]] || sleep "$PAUSE"
if [[ $1 == venv ]]; then
  mkdir -p "${@: -1}/bin"
  cp "$(command -v "${@: -2:1}")" "${@: -1}/bin/python"
elif [[ -n ${BROKEN:-} ]]; then
  exit 1
fi
"""


@pytest.fixture
def setup(tmp_path):
  """Returns a function that calls setup.sh: its installations, its output."""
  repository, programs = tmp_path / 'a b', tmp_path / 'bin'
  (repository / 'launch').mkdir(parents=True)
  programs.mkdir()
  shutil.copy(ROOT / 'launch/setup.sh', repository / 'launch')
  shutil.copy(ROOT / 'pyproject.toml', repository)
  for name, version, old in (
    ('python3', '3.11.7', 0),
    ('python3.12', '3.12.1', 0),
    ('python3.8', '3.8.1', 1),
  ):
    text = PYTHON.format(version=version, old=old)
    (programs / name).write_text(text)
  (programs / 'uv').write_text(UV)
  for program in programs.iterdir():
    program.chmod(0o755)
  said = tmp_path / 'said'

  def start(**variables):
    env = dict(
      PATH=f'{programs}:{os.environ["PATH"]}', SAID=str(said), **variables
    )
    return subprocess.Popen(
      ['bash', repository / 'launch/setup.sh'],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def call(code=0, **variables):
    said.write_text('')
    process = start(**variables)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    lines = said.read_text().splitlines()
    return [line.split()[-1] for line in lines if line.startswith('pip')], err

  call.start, call.said, call.repository = start, said, repository
  return call


def test_a_superset_serves_in_any_order(setup):
  assert setup(EXTRAS='dev,tpu')[0] == ['.[dev,tpu]']
  for extras in ('tpu,dev', 'dev', 'tpu', '', 'dev, dev', 'dev,tpu'):
    assert setup(EXTRAS=extras)[0] == []
  assert setup(EXTRAS='cuda')[0] == ['.[cuda,dev,tpu]']  # none is lost
  for extras in ('cuda,dev', 'dev,tpu'):
    assert setup(EXTRAS=extras)[0] == []


def test_changes_install_again(setup):
  assert setup()[0] == ['.']
  with (setup.repository / 'pyproject.toml').open('a') as file:
    file.write('# changed\n')
  assert setup()[0] == ['.'] and setup()[0] == []
  shutil.rmtree(setup.repository / '.venv/bin')
  assert setup()[0] == ['.'] and setup()[0] == []


def test_another_python_makes_the_environment_anew(setup):
  assert setup(EXTRAS='dev')[0] == ['.[dev]']
  assert setup(EXTRAS='tpu', PYTHON='python3.12')[0] == ['.[tpu]']
  assert setup(PYTHON='python3.12')[0] == []
  assert setup(EXTRAS='tpu')[0] == []  # whichever Python it has
  assert setup(EXTRAS='dev')[0] == ['.[dev,tpu]']  # and it keeps that
  version = (setup.repository / '.venv/installed').read_text().splitlines()[0]
  assert version == 'Python 3.12.1'


def test_an_interrupted_installation_is_none(setup):
  assert setup()[0] == ['.']
  assert setup(EXTRAS='dev', BROKEN='1', code=1)[0] == ['.[dev]']
  assert setup()[0] == ['.']
  assert setup()[0] == []


def test_an_environment_anywhere(setup, tmp_path):
  there = tmp_path / 'else where' / 'venv'
  assert setup(VENV=str(there))[0] == ['.']
  assert (there / 'installed').exists()
  assert not (setup.repository / '.venv').exists()
  assert setup(VENV=str(there))[0] == []
  moved = there.rename(tmp_path / 'moved')  # its scripts name the old place
  assert setup(VENV=str(moved))[0] == ['.']


def test_two_at_once_install_once(setup):
  setup.said.write_text('')
  both = [setup.start(EXTRAS='dev', PAUSE='0.3') for _ in range(2)]
  time.sleep(0.1)
  for process in both:
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
  lines = setup.said.read_text().splitlines()
  assert [line.split()[0] for line in lines] == ['venv', 'pip']


def test_nodes_without_a_network_only_check(setup):
  calls, err = setup(EXTRAS='cuda', INSTALL='no', code=1)
  assert calls == [] and err.count('\n') == 1
  assert 'node with internet access: EXTRAS=cuda bash launch/setup.sh' in err
  assert not (setup.repository / '.venv').exists()
  setup(EXTRAS='cuda,dev')
  assert setup(EXTRAS='cuda', INSTALL='no') == ([], '')


@pytest.mark.parametrize(
  'variables,message',
  [
    ({'EXTRAS': 'dev,tup'}, "pyproject.toml has no extra 'tup'"),
    ({'PYTHON': 'python3.8'}, 'python3.8 is older than Python 3.11'),
  ],
  ids=str,
)
def test_mistakes_are_one_line(variables, message, setup):
  calls, err = setup(code=1, **variables)
  assert calls == [] and err.startswith('error: ') and message in err
  assert err.count('\n') == 1
