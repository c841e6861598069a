"""Runs the programs of a study, one after another, and stores each at once.

A study stopped between two programs continues with the first that is missing
in `results.jsonl`; a program is done if one with its config and grid is. All
programs are checked before the first one trains.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.config import Config, ConfigError, choose
from efficient_attn.models import cost
from efficient_attn.train.check import check as check_run
from efficient_attn.train.check import check_fit
from efficient_attn.train.grid import Grid
from efficient_attn.train.machine import memory_available
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.objectives.sums import means
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_eval_step
from experiments.ablations.match import matched, sizes
from experiments.ablations.records import append
from experiments.ablations.study import Program, Study, naming, programs
from experiments.machine import machine

CALL = 20  # training steps a call, at most
MEMORY = 0.5  # share of it that the arrays of a program may take


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
  """A program with the sizes that the report shows."""

  program: Program
  sizes: Mapping[str, float]
  key: str  # of its config, tests and grid


def plan(values: Mapping[str, Any], study: Study) -> Iterator[Planned]:
  """Yields the programs of a study, each matched to the first of its task."""
  firsts = {}
  for program in programs(values, study):
    with naming(program.task, program.architecture):
      batch = first_batch(program.config)
      config = program.config
      if study.match and program.task in firsts:
        config = matched(config, batch, study.match, firsts[program.task])
      program = dataclasses.replace(program, config=config)
      check(program, study.metric)
      counted = sizes(config, batch)
    firsts.setdefault(program.task, counted)
    yield Planned(program=program, sizes=counted, key=_key(program, study))


def first_batch(config: Config) -> dict:
  """Returns a batch of the config's training data."""
  dataset = data.load(config.data, batch_size=config.batch_size)
  return next(iter(dataset.train))


def check(program: Program, metric: str) -> None:
  """Raises when a program cannot be trained, tested or judged by `metric`.

  Every batch shape is traced, so that what a model refuses is known now.
  """
  config = program.config
  architecture = check_run(config).architecture
  params = architecture.abstract_params()
  traced = {}
  for name, tested in {None: config.data, **program.tests}.items():
    config = dataclasses.replace(config, data=tested)
    dataset = data.load(tested, batch_size=config.batch_size)
    check_fit(config, dataset)
    batch = next(iter(dataset.train if name is None else dataset.valid), None)
    if batch is None:
      raise ConfigError(f'sweep.tests: {name!r} has no examples')
    shapes = str(jax.tree.map(jax.typeof, batch))
    if shapes not in traced:
      evaluate = make_eval_step(
        architecture, make_objective(config, dataset.tokenizer)
      )
      traced[shapes] = jax.eval_shape(
        lambda *x, evaluate=evaluate: means(evaluate(*x)), params, batch
      )
    choose('sweep.metric', metric, traced[shapes])


def _key(program: Program, study: Study) -> str:
  said = [dataclasses.asdict(program), [vars(run) for run in study.runs]]
  text = json.dumps(said, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(planned: Planned, study: Study, out: pathlib.Path, progress) -> dict:
  """Trains one program and appends its record to `results.jsonl`.

  Args:
    planned: the program.
    study: its grid.
    out: folder of the results.
    progress: called with (steps done, mean loss) after each call.
  """
  program, start = planned.program, time.perf_counter()
  config = program.config
  at_once = runs_at_once(config)
  records = []
  for first in range(0, len(study.runs), at_once):
    grid = Grid(config, study.runs[first : first + at_once])
    call = max(n for n in range(1, CALL + 1) if config.steps % n == 0)
    while grid.steps < config.steps:
      grid.train(call)
      progress(grid.steps, float(grid.losses[-1].mean()))
    tests = {name: grid.evaluate(test) for name, test in program.tests.items()}
    records += [
      dataclasses.asdict(r)
      | dict(
        tests={name: found[i] for name, found in tests.items()},
        skipped_steps=int(grid.skipped[i]),
        losses=_thinned(grid.losses[:, i]),
      )
      for i, r in enumerate(grid.runs)
    ]
  record = dict(
    key=planned.key,
    task=program.task,
    architecture=program.architecture,
    sizes=dict(planned.sizes),
    seconds=round(time.perf_counter() - start, 1),
    machine=machine(),
    config=configs.as_dict(config),
    runs=records,
  )
  append(out, record)
  return record


def runs_at_once(config: Config) -> int:
  """Returns how many runs of a config fit into memory together."""
  architecture = Architecture(config.model)
  loss = make_objective(config)
  params = jax.eval_shape(architecture.initial_params, jax.random.key(0))

  def gradient(params, batch):
    def objective(params):
      return loss(architecture.merge(params), batch, None)['objective']

    return jax.grad(objective)(params)

  batch = first_batch(config)
  needed = cost.count(gradient, params, batch).peak_bytes
  needed += 3 * sum(4 * leaf.size for leaf in jax.tree.leaves(params))
  return max(1, math.floor(MEMORY * memory_available() / needed))


def _thinned(losses, points: int = 100) -> list[float]:
  """At most `points` means of neighbouring losses."""
  parts = min(points, len(losses))
  edges = [len(losses) * i // parts for i in range(parts + 1)]
  return [
    float(f'{losses[a:b].mean():.5g}')
    for a, b in zip(edges, edges[1:], strict=False)
  ]
