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


@pytest.fixture
def static(tmp_path, monkeypatch):
  """Runs bench.py on a suite of TPUs that are not there."""
  reports, version = [], {'libtpu': '1'}
  fake = types.SimpleNamespace(
    ROWS={'a': 0, 'b': 0},
    measure=lambda topology, rows: {f'{row}/ms': len(rows) for row in rows},
    write_report=reports.append,
  )
  monkeypatch.setitem(sys.modules, 'fake_static', fake)
  monkeypatch.setitem(SUITES, 'fake', 'fake_static')
  monkeypatch.setattr(bench, 'STATIC', ('fake',))
  monkeypatch.setattr(cli, 'use_cpu_devices', lambda *_: None)
  monkeypatch.setattr(
    bench.importlib.metadata, 'version', lambda name: version.get(name, '0')
  )

  def run(*arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
      sys, 'argv', ['bench.py', '--suite=fake', '--out=a', *arguments]
    )
    bench.main()
    path = tmp_path / 'a' / 'fake' / 'v5e_2x4.json'
    assert reports.pop() == path.parent
    return json.loads(path.read_text())

  return types.SimpleNamespace(run=run, version=version)


def test_a_static_suite_stores_by_topology_and_keeps_what_is_not_named(static):
  record = static.run('--topology=v5e:2x4')
  assert record['topology'] == 'v5e:2x4'
  assert record['versions']['libtpu'] == '1'
  assert record['figures'] == {'a/ms': 2, 'b/ms': 2}
  record = static.run('--topology=v5e:2x4', '--only=b')
  assert record['figures'] == {'a/ms': 2, 'b/ms': 1}


def test_figures_of_two_compilers_do_not_mix(static, capsys):
  static.run('--topology=v5e:2x4')
  static.version['libtpu'] = '2'
  with pytest.raises(SystemExit):
    static.run('--topology=v5e:2x4', '--only=b')
  error = capsys.readouterr().err
  assert error.startswith('error: --only=b: ') and error.count('\n') == 1


def test_an_unknown_row_is_named(static, capsys):
  with pytest.raises(SystemExit):
    static.run('--only=c')
  assert "--only='c' is unknown" in capsys.readouterr().err
