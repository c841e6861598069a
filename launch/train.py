"""Trains a model from a config file; run again, it continues.

python launch/train.py --config=configs/lm/quickstart.py --workdir=runs/a \
    --config.model.pattern=attention --config.steps=500
"""

import argparse

from efficient_attn import cli


def main():
  """Reads the flags, starts the devices and trains."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True, help='where the run lives')
  with cli.clear_errors():
    config, args = cli.parse_config(parser)
    cli.start_devices(config)
    # Imported here, because importing may already touch the devices.
    from efficient_attn.train.trainer import run

    run(config, args.workdir)


if __name__ == '__main__':
  main()
