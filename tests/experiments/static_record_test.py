"""The kernels are as fast as on record, by the schedule of the compiler."""

import importlib.metadata
import json
import pathlib

import pytest

from experiments.benchmarks import static
from experiments.benchmarks.static_ops import OPS

RECORDS = {
  path.stem: json.loads(path.read_text())
  for path in sorted(
    (pathlib.Path(static.__file__).parent / 'results' / 'static').glob('*.json')
  )
}
CASES = [
  (stem, static.Case(op, which, implementation))
  for stem, record in RECORDS.items()
  for op in dict.fromkeys(key.split('/')[0] for key in record['figures'])
  for implementation in OPS[op].implementations
  if implementation != 'xla'
  for which in OPS[op].passes
]


@pytest.mark.exhaustive  # a few at a commit
@pytest.mark.parametrize('stem, case', CASES, ids=str)
def test_a_kernel_is_not_10_percent_worse_than_on_record(stem, case):
  record = RECORDS[stem]
  for name in ('jax', 'libtpu'):
    try:
      version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      version = 'not installed'
    if version != record['versions'][name]:
      pytest.skip(f'of {name} {record["versions"][name]}; here it is {version}')
  (found,) = static.run(record['topology'], [case])
  worse = static.worsened(record, case, found)
  assert not worse, '\n'.join(worse)


def test_the_record_of_an_op_has_its_kernels():
  assert CASES
  for stem, case in CASES:
    assert '/'.join((*case, 'ms')) in RECORDS[stem]['figures'], (stem, case)


def test_what_became_worse_is_named_with_the_command():
  case = static.Case('linear scalar', 'forward', 'pallas_tpu')
  names = ('ms', 'gate/cycles', 'gate/MXU')
  figures = {'/'.join((*case, name)): 1.0 for name in names}
  record = dict(topology='v5e:2x2', figures=figures)
  found = {'ms': 1.09, 'gate/cycles': 1.2, 'gate/MXU': 9.0}
  worse, command = static.worsened(record, case, found)
  assert worse == (
    'linear scalar/forward/pallas_tpu/gate/cycles was 1, is 1.2: +20%'
  )
  assert command.endswith("--topology=v5e:2x2 --only='linear scalar'")
  assert not static.worsened(record, case, {'ms': 1.09})
  (new, _) = static.worsened(record, case, {'new/cycles': 1.0})
  assert 'new/cycles is not on record' in new
