"""Runs a benchmark suite on this machine and stores its figures.

python launch/bench.py --suite=trainer
"""

import argparse
import importlib
import json
import os
import pathlib
import sys

from efficient_attn import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.benchmarks import SUITES  # noqa: E402
from experiments.machine import machine  # noqa: E402


def main():
  """Measures, prints and writes results/<device>/<suite>.json."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--suite', required=True, choices=SUITES)
  parser.add_argument('--rounds', type=int, default=5, help='repetitions')
  parser.add_argument(
    '--out',
    type=pathlib.Path,
    default=ROOT / 'experiments' / 'benchmarks' / 'results',
    help='folder of the results',
  )
  parser.add_argument(
    '--topology', default='v5e:2x2', help='of TPUs, for --suite=static'
  )
  args = parser.parse_args()
  out = args.out.absolute()  # counted from where the user is
  os.chdir(ROOT)
  # A device a core is for runs that spread over them.
  collectives = args.suite in ('grid', 'trainer')
  many = collectives or args.suite in ('attention', 'linear')
  cli.use_cpu_devices(cli.count_cores() if many else 1, collectives)
  static = args.suite == 'static'
  suite = importlib.import_module(SUITES[args.suite])
  figures = suite.measure(args.topology if static else args.rounds)
  record = dict(
    suite=args.suite,
    **(dict(topology=args.topology) if static else dict(rounds=args.rounds)),
    **machine(),
    figures={name: float(f'{value:.4g}') for name, value in figures.items()},
  )
  path = out / record['device'] / f'{args.suite}.json'
  if static:
    path = out / 'static' / f'{args.topology.replace(":", "_")}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')
  if static:
    suite.write_table(path.parent)
  for name, value in record['figures'].items():
    print(f'{name:40} {value:g}')
  print(f'stored in {path}')


if __name__ == '__main__':
  main()
