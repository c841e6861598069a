"""The training loop: `run(config, workdir)`, from a config to a trained model.

A run is a function of its config: stopping it at any step and starting it again
in the same workdir gives the same parameters, bit for bit. The loop never waits
for the device in order to report: while step i runs it reads about step i-1.
"""

import contextlib
import dataclasses
import math
import pathlib

import jax
from jax.sharding import NamedSharding

from efficient_attn import config_files, data, sharding
from efficient_attn.config import Config, ConfigError
from efficient_attn.models import with_dtype
from efficient_attn.train import frozen
from efficient_attn.train import workdir as folder
from efficient_attn.train.check import Checked, check
from efficient_attn.train.checkpoint import Checkpoints
from efficient_attn.train.evaluate import evaluate
from efficient_attn.train.groups import FROZEN
from efficient_attn.train.init_from import initial_values
from efficient_attn.train.machine import memory_total
from efficient_attn.train.meter import Meter
from efficient_attn.train.metrics import MetricWriter, plot_loss
from efficient_attn.train.optimizer import make_schedule
from efficient_attn.train.state import Architecture, TrainState, changing
from efficient_attn.train.step import (
  evaluated_params,
  make_eval_step,
  make_train_step,
)
from efficient_attn.train.watch import (
  Batches,
  StepGuard,
  StopSignal,
  Tracer,
)


def run(
  config: Config, workdir: str | pathlib.Path, devices=None
) -> dict[str, float]:
  """Trains, or continues, the run in `workdir`.

  Args:
    config: the resolved config.
    workdir: gets config.json, metrics.jsonl, tensorboard/, checkpoints/ and
      loss.png. If it holds checkpoints, the run continues from the newest. No
      other process may train there meanwhile.
    devices: to run on; all by default.

  Returns:
    The final validation metrics; empty when a signal stopped the run.

  Raises:
    ConfigError: the config cannot be run, or not in this workdir.
    NonFiniteError: training diverged.
  """
  workdir = folder.resolve(workdir)
  checked = check(config)
  mesh = sharding.make_mesh(checked.config.mesh, devices)
  checked = on_these_devices(checked, mesh)
  config, architecture = checked.config, checked.architecture
  check_batch(config, mesh)
  with contextlib.ExitStack() as stack:
    stack.enter_context(folder.clear_disk_faults(workdir))
    stack.enter_context(folder.only_writer(workdir))
    folder.check_same_run(config, workdir)
    stack.enter_context(jax.set_mesh(mesh))
    dataset, teacher = checked.dataset, checked.teacher
    iterator, put = iter(dataset.train), batch_putter(mesh)
    identity = teacher.identity() if teacher else ''
    checkpoints = Checkpoints(workdir, config, dataset.fingerprint, identity)
    stack.callback(checkpoints.close)
    state = begin(checked, checkpoints, workdir, mesh, iterator)
    jax.block_until_ready(state)
    first = int(state.step)
    check_steps(config, workdir, first)
    batches = Batches(iterator)
    if jax.process_index() == 0:
      with folder.naming(workdir / 'config.json'):
        config_files.save(config, workdir / 'config.json')

    # The two compiled functions.
    train_step = jax.jit(
      make_train_step(
        config,
        architecture,
        checked.optimizer,
        checked.objective,
        teacher and teacher.architecture,
      ),
      donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(architecture, checked.objective))

    writer = stack.enter_context(MetricWriter(workdir, config.steps, first))
    writer.message(describe(config, architecture, mesh, first))
    readings = dataset.readings(config.steps) if dataset.readings else ()
    for note in (*dataset.notes, *readings):
      writer.message(str(note))
    stop = stack.enter_context(StopSignal(config.log_every))
    tracer = stack.enter_context(Tracer(config.profile_steps, workdir))
    guard = StepGuard(config, checkpoints)
    meter = Meter(config, checked.forward_flops, mesh)
    schedule = make_schedule(config.optimizer, config.steps)

    def report(step, metrics):
      values = guard.check(step, metrics)
      read = values.pop('tokens_read')
      values['learning_rate'] = float(schedule(step - 1))
      row = step in (1, config.steps) or due(step, config.log_every)
      if step == first + 1:
        meter.compiled(int(state.step), state.params)
        writer.message(f'compiled in {meter.compile_seconds:.1f} s')
        if not row:  # the run without a stop has none here either
          writer.show(step, values)
      elif row:
        values |= meter.rates(step, read)
      if row:
        writer.write(step, values)

    def validate(step):
      with meter.paused():
        values = evaluate(
          eval_step,
          evaluated_params(state),
          dataset,
          put,
          limit=config.eval_batches,
        )
      writer.write(step, values, prefix='valid')
      return values

    def report_pending():
      nonlocal pending
      if pending:
        report(*pending)
      pending = None

    def save(step):
      nonlocal saved
      report_pending()
      checkpoints.save(step, changing(state, config), iterator)
      batches.mark()
      saved = step

    @contextlib.contextmanager
    def keeping(done):
      """Saves the steps done before an error of the data goes on.

      Other processes, which have no error, would not join in.
      """
      try:
        yield
      except Exception:
        if done > saved and jax.process_count() == 1:
          batches.rewind()
          save(done)
          writer.message(f'saved step {done} because of an error in the data')
        raise

    pending, saved = None, first
    meter.start(first)
    # The run may have stopped, or been killed, before this validation.
    unmeasured = first < config.steps and due(first, config.eval_every)
    if first and unmeasured and not writer.has(first, 'valid'):
      validate(first)
    for step in range(first + 1, config.steps + 1):
      tracer.at(step)
      with meter.waiting_for_data(), keeping(step - 1):
        host_batch = next(batches)
        guard.remember(step, host_batch)
        batch = put(host_batch)
      state, metrics = train_step(state, batch)
      report_pending()
      pending = (step, metrics)
      stopped = stop.requested(step)
      last = stopped or step == config.steps
      if last or due(step, config.checkpoint_every):
        save(step)
      if stopped:
        checkpoints.wait()
        writer.message(
          f'stopped by {stop.name} after step {step}; run the same command '
          f'again to continue from {workdir}'
        )
        return {}
      if not last and due(step, config.eval_every):
        report_pending()
        with keeping(step):
          validate(step)
    final = validate(config.steps)
    if jax.process_index() == 0:
      with folder.naming(workdir / 'loss.png'):
        plot_loss(workdir)
  return final


def on_these_devices(checked: Checked, mesh: jax.sharding.Mesh) -> Checked:
  """Returns a run with the dtype of the devices and this process's data."""
  config = checked.config
  model = with_dtype(config.model, mesh)
  config = dataclasses.replace(config, model=model)
  architecture, dataset = checked.architecture, checked.dataset
  if model != architecture.config:
    architecture = Architecture(model, config.lora, config.optimizer)
  if jax.process_count() > 1:
    dataset = data.load(
      config.data,
      batch_size=config.batch_size,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
  return dataclasses.replace(
    checked, config=config, architecture=architecture, dataset=dataset
  )


def begin(
  checked: Checked,
  checkpoints: Checkpoints,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  iterator,
) -> TrainState:
  """Returns the state of the newest checkpoint, or that of step 0.

  Also winds the iterator to the batch that follows.
  """
  config, architecture = checked.config, checked.architecture
  teacher, optimizer = checked.teacher, checked.optimizer
  abstract = architecture.abstract_state(
    config, optimizer, mesh, teacher and teacher.architecture
  )
  check_memory(abstract, mesh)
  guide = teacher and teacher.params(mesh)
  state = checkpoints.restore(changing(abstract, config), iterator)
  if state is None:
    source = checked.source
    given = source and initial_values(source, mesh)
    state = architecture.init(config, optimizer, mesh, given, guide)
    frozen.save(workdir, state.frozen)
    return state
  return dataclasses.replace(
    state,
    frozen=frozen.load(workdir, abstract.frozen),
    teacher=guide or state.teacher,
  )


def due(step: int, every: int) -> bool:
  """Whether something that happens `every` steps (0: never) happens now."""
  return bool(every) and step % every == 0


def batch_putter(mesh: jax.sharding.Mesh):
  """Returns a function that spreads the rows of a host batch over devices.

  Each process gives its own rows of the batch.
  """

  def put(batch):
    def leaf(x):
      spec = sharding.activation_spec(('batch',) + (None,) * (x.ndim - 1))
      return jax.make_array_from_process_local_data(
        NamedSharding(mesh, spec), x
      )

    return jax.tree.map(leaf, batch)

  return put


def check_batch(config: Config, mesh: jax.sharding.Mesh) -> None:
  """Raises when the rows of a micro-batch do not spread over the devices."""
  rows = config.batch_size // config.accumulate
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if rows % shards:
    raise ConfigError(
      f'batch_size={config.batch_size} over accumulate={config.accumulate} is '
      f'{rows} rows, which data x fsdp = {shards} devices do not divide'
    )


def check_memory(state, mesh: jax.sharding.Mesh) -> None:
  """Raises when the state alone is larger than the memory of the devices."""
  a_device = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(state)
  )
  devices = mesh.local_devices
  needed, there = a_device * len(devices), memory_total(devices)
  if needed > there:
    raise ConfigError(
      f'the parameters and the optimizer take {needed / 2**30:.3g} GiB on the '
      f'devices of this process, which have {there / 2**30:.3g} GiB; shrink '
      'the model, or shard it over more devices (mesh=fsdp=...)'
    )


def check_steps(config: Config, workdir: pathlib.Path, done: int) -> None:
  """Raises when a run has already done more steps than are asked for."""
  if done > config.steps:
    raise ConfigError(
      f'steps={config.steps} but the run in {workdir} has done {done}; raise '
      'steps, or use a new workdir'
    )


def describe(config, architecture, mesh, first) -> str:
  """Returns the lines printed when a run begins."""
  sizes = architecture.sizes()
  frozen = sum(n for p, n in sizes.items() if architecture.groups[p] is FROZEN)
  axes = ', '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  start = f'continues after step {first}' if first else 'starts'
  return (
    f'{config.model.name}: {sum(sizes.values()):,} parameters'
    f'{f" ({frozen:,} frozen)" * bool(frozen)}, {config.model.dtype} '
    f'activations, pattern {"-".join(config.model.pattern)}\n'
    f'{mesh.size} {mesh.devices.flat[0].device_kind} devices: {axes}\n'
    f'{start}, {config.steps} steps'
  )
