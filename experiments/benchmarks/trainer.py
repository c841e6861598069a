"""What the framework itself costs: steps, compilation, import, CPU devices."""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import optax

from efficient_attn import cli, config_files, data, sharding
from efficient_attn import config as configs
from efficient_attn.models import init, with_dtype
from efficient_attn.train.metrics import read_metrics
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.trainer import batch_putter, run

QUICKSTART = 'configs/lm/quickstart.py'


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite; `rounds` scales how often everything is repeated."""
  return (
    step_overhead(rounds)
    | compile_ratio()
    | import_ratio(rounds)
    | cpu_device_ratio(rounds)
  )


def quickstart(**changes) -> configs.Config:
  """Returns the quickstart's config with changes."""
  values = config_files.load(QUICKSTART)
  config = configs.resolve(configs.override(values, changes))
  return dataclasses.replace(config, model=with_dtype(config.model))


def step_overhead(rounds: int) -> dict[str, float]:
  """The trainer's step over a bare loop around the same jitted mathematics.

  Both take `steps` steps in turn; the bare loop has no metrics, guards,
  checkpoints or reports, its batches are on the device already, and it waits
  only at the end.
  """
  steps = 40
  config = quickstart(
    steps=steps, log_every=10, eval_batches=1, checkpoint_every=0,
    **{'optimizer.warmup_steps': 5},
  )  # fmt: skip
  bare = bare_loop(config, steps)
  ratios, trainer_ms = [], []
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as workdir:
      run(config, workdir)
      seconds = step_seconds(workdir)
    trainer_ms.append(1e3 * seconds)
    ratios.append(seconds / bare())
  return dict(
    trainer_step_ms=statistics.median(trainer_ms),
    trainer_over_bare_step=statistics.median(ratios),
  )


def step_seconds(workdir: str) -> float:
  """Returns the median step time that a run reported."""
  key = 'train/step_seconds'
  return statistics.median(r[key] for r in read_metrics(workdir) if key in r)


def bare_loop(config: configs.Config, steps: int):
  """Returns a function that takes `steps` plain steps: seconds per step."""
  mesh = sharding.make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    dataset = data.load(config.data, batch_size=config.batch_size)
    stream, put = iter(dataset.train), batch_putter(mesh)
    batches = [put(next(stream)) for _ in range(4)]
    architecture = Architecture(config.model)
    optimizer = architecture.optimizer(config)
    state = architecture.init(config, optimizer, mesh)
    loss = make_objective(config)

    def mean(params, batch):
      sums = loss(architecture.merge(params), batch, None)
      return sums['objective'] / sums['weight']

    @jax.jit(donate_argnums=(0, 1))
    def step(params, opt_state, batch):
      value, grads = jax.value_and_grad(mean)(params, batch)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, value

  held = [state.params, state.opt_state]

  def loop():
    loss = 0.0
    with jax.set_mesh(mesh):
      for i in range(steps + 1):
        if i == 1:  # the first step compiles
          jax.block_until_ready(held[0])
          start = time.perf_counter()
        before, (*held[:], loss) = loss, step(*held, batches[i % 4])
        float(before)  # keeps two steps in flight, as the trainer does
      jax.block_until_ready(held[0])
    return (time.perf_counter() - start) / steps

  loop()
  return loop


def compile_ratio() -> dict[str, float]:
  """Compiling the gradient of 24 layers over that of 6, scanned."""
  seconds = {}
  for layers in (6, 24):
    config = quickstart(**{'model.num_layers': layers}).model
    model = init(config, jax.random.key(0))
    tokens = jax.numpy.zeros((8, 256), jax.numpy.int32)
    gradient = jax.jit(jax.grad(lambda m, t: m(t)[0].mean()))
    start = time.perf_counter()
    gradient.lower(model, tokens).compile()
    seconds[layers] = time.perf_counter() - start
  return dict(
    compile_6_layers_s=seconds[6],
    compile_24_layers_s=seconds[24],
    compile_24_over_6_layers=seconds[24] / seconds[6],
  )


def import_ratio(rounds: int) -> dict[str, float]:
  """Importing `efficient_attn.ops` over importing jax, in new processes."""
  modules = ('jax', 'efficient_attn.ops')
  seconds = {module: [] for module in modules}
  for _ in range(rounds + 1):  # the first round warms the disk cache
    for module in modules:
      start = time.perf_counter()
      subprocess.run([sys.executable, '-c', f'import {module}'], check=True)
      seconds[module].append(time.perf_counter() - start)
  jax_s, ops_s = (statistics.median(seconds[module][1:]) for module in modules)
  return dict(import_jax_s=jax_s, import_ops_over_jax=ops_s / jax_s)


def cpu_device_ratio(rounds: int) -> dict[str, float]:
  """The quickstart's step with one CPU device over one device a core."""
  if jax.default_backend() != 'cpu':
    return {}
  cores = cli.count_cores()
  seconds = {1: [], cores: []}
  changes = (
    'steps=41',
    'eval_batches=1',
    'checkpoint_every=0',
    'optimizer.warmup_steps=5',
  )
  for _ in range(rounds):
    for devices, found in seconds.items():
      with tempfile.TemporaryDirectory() as workdir:
        subprocess.run(
          [
            sys.executable,
            'launch/train.py',
            f'--config={QUICKSTART}',
            f'--workdir={workdir}',
            f'--config.cpu_devices={devices}',
            *(f'--config.{change}' for change in changes),
          ],
          check=True,
          capture_output=True,
        )
        found.append(step_seconds(workdir))
  one, every = (statistics.median(found) for found in seconds.values())
  return {
    'one_cpu_device_step_ms': 1e3 * one,
    f'{cores}_cpu_devices_step_ms': 1e3 * every,
    'one_device_over_one_a_core': one / every,
  }
