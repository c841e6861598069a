"""What a student learns from a teacher beside what it learns from text."""

import dataclasses
import pathlib
import tempfile

from efficient_attn import config as configs
from efficient_attn import config_files
from efficient_attn.train import trainer
from efficient_attn.train.state import Architecture
from experiments import page
from experiments.provenance import ROOT
from experiments.survey.claim import Claim, holds, statement
from experiments.survey.sources import OURS

CONFIG = ROOT / 'configs' / 'lm' / 'distill.py'
STUDENTS = ('small', 'gla')
SEEDS = (0, 1, 2)


def measure() -> dict:
  """R52: bits per byte of a teacher, and of students with and without it."""
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    teacher = folder / 'teacher'
    found = dict(teacher=train('teacher', teacher))
    for name in STUDENTS:
      begun = {'init_from.run': str(teacher)} if name == 'gla' else {}
      taught = {'teacher.run': str(teacher)}
      for kind, changes in ('alone', begun), ('taught', begun | taught):
        found[f'{name} {kind}'] = [
          train(name, folder / f'{name}-{kind}-{seed}', seed=seed, **changes)
          for seed in SEEDS
        ]
  return found


def train(name: str, workdir: pathlib.Path, **changes) -> dict:
  """Trains a model of the config; returns its size and bits per byte."""
  values = config_files.load(f'{CONFIG}:{name}')
  config = configs.resolve(configs.override(values, changes))
  config = dataclasses.replace(config, checkpoint_every=0)
  final = trainer.run(config, workdir)
  sizes = Architecture(config.model).sizes()
  return dict(bits=final['bits_per_byte'], parameters=sum(sizes.values()))


def bits(values, name: str, kind: str) -> list[float]:
  """Returns the bits per byte of all seeds."""
  return [row['bits'] for row in values[f'{name} {kind}']]


def gains(values, name: str) -> list[float]:
  """Returns by how many bits the teacher helps, by seed."""
  pairs = zip(
    *(bits(values, name, k) for k in ('alone', 'taught')), strict=True
  )
  return [alone - taught for alone, taught in pairs]


def helped(name: str, says: str):
  """Makes the statement that a student learns more with its teacher."""

  @statement(
    says,
    f'{OURS}, on S000 Distillation',
    rule='fewer bits per byte of the held-out text with the teacher than '
    'without, of the same initial values and batches, for each of three seeds',
  )
  def a_teacher_helps(values):
    found = gains(values, name)
    texts = (f'{gain:+.3f}' for gain in found)
    return holds(min(found) > 0), f'{", ".join(texts)} bits per byte'

  return a_teacher_helps


def _table(v) -> list:
  rows = [['teacher', f'{v["teacher"]["parameters"]:,}', '', '']]
  rows[0][2] = f'{v["teacher"]["bits"]:.3f}'
  for name in STUDENTS:
    for kind in ('alone', 'taught'):
      found = bits(v, name, kind)
      size = v[f'{name} {kind}'][0]['parameters']
      mean = sum(found) / len(found)
      each = ', '.join(f'{x:.3f}' for x in found)
      rows.append([f'{name}, {kind}', f'{size:,}', f'{mean:.3f}', each])
  head = ['model', 'parameters', 'bits/byte', 'by seed']
  note = (
    'configs/lm/distill.py: 3 layers of softmax attention teach one layer of '
    'half the width (small), and 3 layers of gated linear attention that begin '
    'with the embedding, norms and ffns of the teacher in either case (gla).'
  )
  return [page.Table(head, rows), page.Text(note, note=True)]


R52 = Claim(
  title='Distillation of a language model, trained',
  tier='b',
  measure=measure,
  seeds=SEEDS,
  parts=_table,
  statements=(
    helped('small', 'A smaller student learns more with a teacher'),
    helped('gla', 'A student of another mixer learns more with a teacher'),
  ),
)

DISTILLATION = {'R52': R52}
