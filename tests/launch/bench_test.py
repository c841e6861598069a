"""bench.py stores figures where it is told to, from wherever it is called."""

import json
import sys
import types

import pytest

from efficient_attn import cli
from experiments.benchmarks import SUITES
from launch import bench


@pytest.mark.parametrize('absolute', [False, True])
def test_out_counts_from_the_callers_folder(absolute, tmp_path, monkeypatch):
  fake = types.SimpleNamespace(measure=lambda rounds: {'x': 1.23456 * rounds})
  monkeypatch.setitem(sys.modules, 'fake_suite', fake)
  monkeypatch.setitem(SUITES, 'fake', 'fake_suite')
  monkeypatch.setattr(cli, 'use_cpu_devices', lambda *_: None)
  monkeypatch.chdir(tmp_path)
  out = str(tmp_path / 'a') if absolute else 'a'
  argv = ['bench.py', '--suite=fake', '--rounds=2', f'--out={out}']
  monkeypatch.setattr(sys, 'argv', argv)
  bench.main()
  record = json.loads((tmp_path / 'a' / 'cpu' / 'fake.json').read_text())
  assert record['figures'] == {'x': 2.469} and record['suite'] == 'fake'
