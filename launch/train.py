r"""Trains a model from a config file; run again, it continues.

python launch/train.py --config=configs/lm/quickstart.py --workdir=runs/a \
    --config.model.pattern=attention --config.steps=500
"""

import argparse
import os
import signal


def main():
  """Reads the flags, starts the devices, trains and says how it went."""
  # The loop has its own handler, which saves; before it there is nothing to.
  before = signal.signal(signal.SIGINT, leave)
  try:
    train()
  finally:
    signal.signal(signal.SIGINT, before)


def leave(number, frame):
  """Ends the process at once, whatever it is importing or compiling."""
  os.write(2, b'interrupted; run the same command again to continue\n')
  os._exit(130)


def train():
  """Trains as `main` says."""
  from efficient_attn import cli

  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', help='where the run lives')
  parser.add_argument(
    '--dry-run', action='store_true', help='check and show the run, then exit'
  )
  with cli.clear_errors():
    config, args = cli.parse_config(parser)
    if args.dry_run:
      from efficient_attn.train.check import check, report

      print(report(check(config)))
      return
    if args.workdir is None:
      parser.error('--workdir is required, except with --dry-run')
    cli.start_devices(config)
    # Imported here, because importing may already touch the devices.
    import jax

    from efficient_attn.train.trainer import run

    final = run(config, args.workdir)
    if final and jax.process_index() == 0:
      print(summary(config, final))


def summary(config, final: dict[str, float]) -> str:
  """Returns the final validation metrics, beside what they compare to."""
  from efficient_attn import data

  found = [f'{name} {value:.4g}' for name, value in final.items()]
  lines = [f'validation: {", ".join(found)}']
  if 'bits_per_byte' in final and not (config.data.path or config.data.mixture):
    dataset = data.load(config.data, batch_size=config.batch_size)
    others = data.compressed_bits_per_byte(dataset.valid_bytes())
    found = [f'{name} {value:.2f}' for name, value in others.items()]
    lines.append(f'bits/byte of others: {", ".join(found)}, uniform 8')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
