"""Measures again what the surveys claim, and says what holds.

  python launch/survey.py --tier=a --out=runs/survey

Tier a counts (under a minute), b computes on a CPU for minutes, c needs an
accelerator. Run it again to continue; what other code measured stays, marked as
outdated. --only=R07,R13 measures those, again if the code has changed.
"""

import argparse
import pathlib
import shlex
import sys

from efficient_attn import cli
from efficient_attn.config import ConfigError
from efficient_attn.values import nearest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
  """Measures, and writes results.json, report.md and report.html."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--tier', default='a,b,c', help='of a,b,c')
  parser.add_argument('--only', default='', help='names of claims')
  parser.add_argument('--out', type=pathlib.Path, default='runs/survey')
  args = parser.parse_args()
  cli.use_cpu_devices(cli.count_cores())
  with cli.clear_errors():
    run(args, shlex.join(['python', *sys.argv]))


def run(args, command: str) -> None:
  """Measures and reports what was asked for."""
  from experiments.folder import only_writer
  from experiments.survey import report
  from experiments.survey.claims import CLAIMS
  from experiments.survey.run import chosen, fits, measure, verdicts

  tiers, only = (
    [part for part in text.split(',') if part]
    for text in (args.tier, args.only)
  )
  for name in only:
    if name not in CLAIMS:
      raise ConfigError(
        f'--only={name}: no such claim; {nearest(name, CLAIMS)}'
      )
  for tier in tiers:
    if tier not in ('a', 'b', 'c'):
      raise ConfigError(f'--tier={tier}: pass some of a,b,c')
  claims = chosen(CLAIMS, tiers, only)
  with only_writer(args.out):
    record = measure(claims, args.out, again=bool(only))
    # Everything measured so far, not only what this call asked for.
    known = {
      name: claim
      for name, claim in CLAIMS.items()
      if name in record['claims'] and fits(claim, record['claims'][name])
    }
    report.write(known, record, command, args.out)
  for name, claim in claims.items():
    found = record['claims'][name]
    for statement, verdict in zip(
      claim.statements, verdicts(claim, found), strict=True
    ):
      print(f'{name}  {verdict:28} {statement.says}')
  print(f'report in {args.out / "report.html"}')


if __name__ == '__main__':
  main()
