"""Writes the tables of README.md: the rows of `MIXERS`, and what holds.

python launch/table.py [--check]

Lowering every mixer for TPUs takes about two minutes, so `--check` takes the
kernels from README.md; tests/layers/tpu_test.py checks those.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from efficient_attn.layers.mixers import FAMILIES, MIXERS, MixerSpec  # noqa: E402
from experiments.benchmarks import lowered  # noqa: E402
from experiments.survey import report  # noqa: E402
from experiments.survey.claims import CLAIMS  # noqa: E402
from tests.interop import oracles  # noqa: E402

README = ROOT / 'README.md'
SURVEY = 'experiments/survey/results'
COLUMNS = {
  'name': lambda name, spec: f'`{name}`',
  'method': lambda name, spec: link(spec),
  'year': lambda name, spec: str(spec.year),
  'family': lambda name, spec: family(name),
  'gate': lambda name, spec: spec.gate,
  'causal': lambda name, spec: yes_or_no(spec.causal),
  'bidirectional': lambda name, spec: yes_or_no(spec.bidirectional),
  'packing': lambda name, spec: yes_or_no(spec.packing),
  'time': lambda name, spec: power(spec.time),
  'decode state': lambda name, spec: power(spec.state) if spec.causal else '–',
  'forms': lambda name, spec: ', '.join(spec.forms),
  'outside oracle': lambda name, spec: oracles.packages(name),
}
KERNELS = 'kernels on TPUs'


def family(name: str) -> str:
  """Returns the family of a row."""
  (found,) = (f for f, rows in FAMILIES.items() if name in rows)
  return found.replace('_', '-')


def link(spec: MixerSpec) -> str:
  """Returns the title, with a link when the reference is an arXiv number."""
  if re.fullmatch(r'\d{4}\.\d{4,5}', spec.reference):
    return f'[{spec.title}](https://arxiv.org/abs/{spec.reference})'
  return f'{spec.title} ({spec.reference})'


def yes_or_no(value: bool | str) -> str:
  """Returns yes or no for a boolean, and a word as it is."""
  return value if isinstance(value, str) else ('no', 'yes')[value]


def power(exponent: float | str) -> str:
  """Returns T to the power of `exponent`, or its logarithm."""
  if exponent == 'log':
    return 'log T'
  return {0: '1', 1: 'T', 2: 'T²'}.get(exponent, f'T^{exponent:g}')


def kernels(name: str) -> str:
  """Returns the cell with the kernels in a layer of this mixer."""
  return kernel_cell(lowered.kernels(lowered.lowered(name)))


def kernel_cell(names: Sequence[str]) -> str:
  """Returns the cell with these kernels."""
  return ', '.join(f'`{name}`' for name in names) or '–'


def stored_kernels(text: str) -> dict[str, str]:
  """Returns the cells of `KERNELS` in README.md by the mixer's name."""
  table = text.partition('<!-- methods -->')[2]
  table = table.partition('<!-- /methods -->')[0]
  heads, _, *rows = (
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table.strip().splitlines()
  )
  if KERNELS not in heads:
    return {}
  return {row[0].strip('`'): row[heads.index(KERNELS)] for row in rows}


def methods(kernels: Mapping[str, str]) -> str:
  """Returns the markdown table, one line a row of `MIXERS`.

  Args:
    kernels: the cells of `KERNELS` by the mixer's name.
  """
  rows = [
    [column(name, spec) for column in COLUMNS.values()]
    + [kernels.get(name, '?')]
    for name, spec in MIXERS.items()
  ]
  heads = [*COLUMNS, KERNELS]
  rows = [heads, ['---'] * len(heads), *rows]
  return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def survey() -> str:
  """Returns the survey's summary, with links into its stored report."""
  record = json.loads((ROOT / SURVEY / 'results.json').read_text())
  table = report.summary(CLAIMS, record).markdown()
  return table.replace('](#', f']({SURVEY}/report.md#') + '\n'


def updated(text: str, kernels: Mapping[str, str]) -> str:
  """Returns `text` with the current tables between their markers."""
  for name, table in (('methods', methods(kernels)), ('survey', survey())):
    begin, end = f'<!-- {name} -->\n', f'<!-- /{name} -->\n'
    before, rest = text.split(begin)
    text = f'{before}{begin}\n{table}\n{end}{rest.split(end)[1]}'
  return text


def main():
  """Writes README.md, or checks that there is nothing to write."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true', help='do not write')
  check = parser.parse_args().check
  text = README.read_text()
  if check:
    if text != updated(text, stored_kernels(text)):
      raise SystemExit('README.md is stale: run python launch/table.py')
  else:
    README.write_text(updated(text, {name: kernels(name) for name in MIXERS}))


if __name__ == '__main__':
  main()
