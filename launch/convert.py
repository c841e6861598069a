"""Makes a run of published weights, and published weights of a run.

python launch/convert.py --from=Llama-3.2-1B --workdir=runs/llama
python launch/train.py --config=runs/llama/config.json --workdir=runs/llama
python launch/convert.py --workdir=runs/llama --to=mine

The directories are those of transformers: config.json, safetensors files, and
a tokenizer, which travels along.
"""

import argparse

from efficient_attn import cli
from efficient_attn.config import ConfigError


def main():
  """Reads the flags and converts."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True, help='of the run')
  parser.add_argument('--from', dest='source', default='', help='directory')
  parser.add_argument('--to', default='', help='directory that is written')
  args = parser.parse_args()
  with cli.clear_errors():
    convert(args.workdir, args.source, args.to)


def convert(workdir: str, source: str, target: str) -> None:
  """Converts in one of the directions, and says what it wrote."""
  if bool(source) == bool(target):
    raise ConfigError('give either --from, a directory of weights, or --to')
  from efficient_attn.train.adopt import adopt, publish

  if source:
    print(f'{adopt(source, workdir)} is a run; train or sample it')
  else:
    publish(workdir, target)
    print(f'{target} holds the weights of {workdir}')


if __name__ == '__main__':
  main()
