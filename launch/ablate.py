"""Compares mixers on a study: every architecture on every task, over a grid.

  python launch/ablate.py --config=configs/ablations/mqar.py:tiny \
    --out=runs/mqar

The runs of a grid (learning rates x weight decays x seeds) are one program.
Run it again to continue; --dry-run shows the programs and stops. A key of the
config is changed by --config.steps=100, one of the study by
--config.sweep.seeds=0,1.
"""

import argparse
import pathlib
import shlex
import sys
import time

from efficient_attn import cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main(argv: list[str] | None = None) -> None:
  """Runs what is missing in --out and writes its report."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', required=True, help='configs/**/x.py[:arg]')
  parser.add_argument('--out', type=pathlib.Path, help='folder of the results')
  parser.add_argument('--dry-run', action='store_true', help='show, not run')
  with cli.clear_errors():
    args, changes = cli.parse_changes(parser, argv)
    if not args.dry_run and args.out is None:
      parser.error('--out is required, except with --dry-run')
    cli.use_cpu_devices(cli.count_cores())
    run(args, changes, shlex.join(['python', *sys.argv]))


def run(args, changes, command):
  """Plans, trains what is not there yet, and reports."""
  from experiments.ablations import harness, study
  from experiments.folder import only_writer

  values, studied = study.load(args.config, changes)
  plans = list(harness.plan(values, studied))
  if args.dry_run:
    show(plans, studied)
    return
  with only_writer(args.out):
    train(plans, studied, command, args.out)
  print(f'report in {args.out / "report.html"}')


def train(plans, studied, command, out):
  """Trains the programs that `out` lacks; the report is always up to date."""
  from experiments.ablations import harness, records, report

  done = records.read(out)

  def publish():
    found = [done[p.key] for p in plans if p.key in done]
    report.write(studied, found, command, out)

  publish()
  for i, planned in enumerate(plans, 1):
    label = f'{i}/{len(plans)} {planned.program.name}'
    if planned.key in done:
      print(f'{label}: done before')
      continue
    start, steps = time.monotonic(), planned.program.config.steps

    def progress(step, loss, label=label, steps=steps, start=start):
      passed = time.monotonic() - start
      print(
        f'\r{label}: step {step}/{steps}, loss {loss:.3f}, '
        f'{passed:.0f} of about {passed * steps / step:.0f} s ',
        end='',
        flush=True,
      )

    done[planned.key] = harness.run(planned, studied, out, progress)
    print()
    publish()


def show(plans, studied):
  """Prints the programs, their sizes and a guess of their time."""
  import jax

  from efficient_attn.train.machine import matmul_ceiling

  ceiling = matmul_ceiling('float32', jax.device_count())
  total = 0
  for planned in plans:
    sizes, runs = planned.sizes, len(studied.runs)
    seconds = 4 * runs * sizes['flops'] / ceiling
    total += seconds
    print(
      f'{planned.program.name:40} {runs} runs x {planned.program.config.steps} '
      f'steps, d_model {planned.program.config.model.d_model}, '
      f'{sizes["params"]:,} parameters, {sizes["state"]:,} bytes of state, '
      f'{sizes["flops"]:.2e} FLOPs a run, about {seconds:.0f} s'
    )
  print(
    f'{len(plans)} programs, about {total:.0f} s at a quarter of the '
    f"machine's {ceiling / 1e9:.0f} GFLOP/s"
  )


if __name__ == '__main__':
  main()
