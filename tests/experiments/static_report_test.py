"""The tables of the static suites are those of their records."""

import json
import pathlib
import shutil

import pytest

from experiments.benchmarks import static_report, static_step

RESULTS = pathlib.Path(static_report.__file__).parent / 'results'
KERNEL = {
  'ms': 3.0,
  'kernels ms': 2.0,
  'traffic GB': 0.5,
  'launches': 4,
  'gate_forward/MXU': 0.61,
  'gate_forward/spills': 7,
  'gate_forward/VMEM MiB': 5.0,
  'gate_forward/cycles': 1,
}
FIGURES = {
  'xla': dict(ms=30, **{'kernels ms': 0, 'traffic GB': 2, 'launches': 90}),
  'pallas_tpu': KERNEL,
  'splash': KERNEL | {'ms': 6.0},
  'roofline': {'ms': 1.5},
}


def written(module, folder, topology, figures):
  record = dict(
    topology=topology, date='2026-01-02', versions={'jax': '1'}, figures=figures
  )
  path = folder / f'{topology.replace(":", "_")}.json'
  path.write_text(json.dumps(record))
  module.write_report(folder)
  return (folder / 'README.md').read_text()


def test_a_row_says_how_an_op_stands(tmp_path):
  figures = {
    f'attention causal/forward/{implementation}/{name}': value
    for implementation, found in FIGURES.items()
    for name, value in found.items()
  }
  text = written(static_report, tmp_path, 'v5e:2x2', figures)
  assert (
    '| attention causal | forward | 30.0 | 3.00 (2.00) | 1.50 | 50% |'
    ' splash 6.00 (2.00) | 0.50 (1.00) | 2.00 / 0.50 | 61% | 7 | 5.0 | 90 / 4 |'
  ) in text
  assert '2026-01-02, jax 1.' in text
  assert (tmp_path / 'v5e_2x2.png').stat().st_size > 10_000


def test_a_peer_that_was_not_measured_says_why(tmp_path):
  figures = {
    'delta channel/both/xla/ms': 3,
    'delta channel/both/xla/traffic GB': 3,
    'delta channel/both/xla/launches': 3,
    'delta channel/both/roofline/ms': 1,
  }
  text = written(static_report, tmp_path, 'v5e:2x2', figures)
  assert 'deltanet-tpu: not installed: Python 3.12, pip install' in text
  assert ', tokamax: only for v6e |' in text


def test_a_step_names_what_is_outside_its_kernels(tmp_path):
  figures = dict.fromkeys(static_step.COLUMNS, 1.25)
  figures |= {'outside/layers/ffn.py:3 dot_general': 7.0}
  figures = {f'gla/{name}': value for name, value in figures.items()}
  text = written(static_step, tmp_path, 'v5e:2x4', figures)
  assert '| gla | dots | 1.25 | 1.25 |' in text
  assert '- 7.0 ms: layers/ffn.py:3 dot_general\n' in text


@pytest.mark.parametrize(
  'module, suite', [(static_report, 'static'), (static_step, 'static_step')]
)
def test_stored_tables_are_those_of_the_records(module, suite, tmp_path):
  shutil.copytree(RESULTS / suite, tmp_path, dirs_exist_ok=True)
  before = (tmp_path / 'README.md').read_text()
  module.write_report(tmp_path)
  assert (tmp_path / 'README.md').read_text() == before, (
    f'python launch/bench.py --suite={suite} writes it'
  )
