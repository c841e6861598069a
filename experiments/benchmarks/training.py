"""Training a language model by mixer: tokens a second, MFU and memory.

The trainer's step with AdamW on random tokens, all mixers in turns. On an
accelerator the model has 12 layers of width 768 and a vocabulary of 50,304,
125M parameters with softmax attention, in bfloat16. Memory is what XLA plans
for the step, with parameters and optimizer state.
"""

import concurrent.futures

import jax
import numpy as np

from efficient_attn import config as configs
from efficient_attn import sharding
from efficient_attn.models import cost
from efficient_attn.train.machine import matmul_ceiling
from efficient_attn.train.objectives import make_objective
from efficient_attn.train.state import Architecture
from efficient_attn.train.step import make_train_step
from efficient_attn.train.trainer import batch_putter
from experiments.benchmarks.timing import interleaved

MIXERS = ('attention', 'window', 'gla', 'gated_deltanet', 'kda', 'mamba2')
LARGE = dict(
  batch_size=8,
  model=dict(d_model=768, num_layers=12, num_heads=12, vocab_size=50_304,
             dtype='bfloat16'),
  data=dict(seq_len=2048),
)  # fmt: skip
TINY = dict(
  batch_size=2,
  model=dict(d_model=32, num_layers=2, num_heads=2, dtype='float32'),
  data=dict(seq_len=64),
)
SIZES = {'cpu': TINY, 'gpu': LARGE, 'tpu': LARGE}


class Training:
  """A model in training, on batches that lie on the device."""

  def __init__(self, mixer: str):
    values = configs.override(SIZES[jax.default_backend()], {
      'model.name': 'lm',
      'model.pattern': (mixer,),
    })  # fmt: skip
    self.config = configs.resolve(values)
    self.mesh = sharding.make_mesh('data=1', jax.devices()[:1])
    self.architecture = Architecture(self.config.model)
    self.optimizer = self.architecture.optimizer(self.config)
    self.loss = make_objective(self.config)
    shape = self.config.batch_size, self.config.data.seq_len + 1
    tokens = np.random.default_rng(0).integers(
      0, self.config.model.vocab_size, shape, np.int32
    )
    with jax.set_mesh(self.mesh):
      self.batch = batch_putter(self.mesh)(
        dict(tokens=tokens, segment_ids=np.ones_like(tokens))
      )
      self.abstract = self.architecture.abstract_state(
        self.config, self.optimizer, self.mesh
      )
    self.state = self.compiled = None

  def lower(self):
    """Traces the step."""
    step = make_train_step(
      self.config, self.architecture, self.optimizer, self.loss
    )
    with jax.set_mesh(self.mesh):
      return jax.jit(step, donate_argnums=0).lower(self.abstract, self.batch)

  def start(self, lowered) -> None:
    """Compiles the step and draws the parameters."""
    self.compiled = lowered.compile()
    with jax.set_mesh(self.mesh):
      self.state = self.architecture.init(
        self.config, self.optimizer, self.mesh
      )

  def step(self):
    """Takes a step; returns its loss."""
    self.state, metrics = self.compiled(self.state, self.batch)
    return metrics['loss']

  def flops(self) -> float:
    """Returns the FLOPs of the products of a step: three forward passes."""

    def forward(params, batch):
      return self.loss(self.architecture.merge(params), batch, None)

    with jax.set_mesh(self.mesh):
      return 3 * cost.flops(forward, self.abstract.params, self.batch)

  def peak_bytes(self) -> int:
    """Returns what XLA plans for a step."""
    planned = self.compiled.memory_analysis()
    return (
      planned.argument_size_in_bytes
      + planned.output_size_in_bytes
      - planned.alias_size_in_bytes
      + planned.temp_size_in_bytes
    )


def measure(rounds: int) -> dict[str, float]:
  """Runs the suite; a mixer that cannot be compiled or run is left out."""
  found, runs = {}, {name: Training(name) for name in MIXERS}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    started = {
      n: pool.submit(run.start, run.lower()) for n, run in runs.items()
    }
  for name, run in list(runs.items()):
    try:
      started[name].result()
      loss = float(run.step())
    except jax.errors.JaxRuntimeError as e:  # out of memory, say
      print(f'{name}: {e}', flush=True)
      del runs[name]
      continue
    if not np.isfinite(loss):
      raise AssertionError(f'{name}: the loss is {loss}')
    found[f'{name}_peak_gib'] = run.peak_bytes() / 2**30
  steps = {name: run.step for name, run in runs.items()}
  for name, seconds in interleaved(steps, rounds).items():
    run = runs[name]
    tokens = run.config.batch_size * run.config.data.seq_len
    found[f'{name}_step_ms'] = 1e3 * seconds
    found[f'{name}_tokens_per_second'] = tokens / seconds
    try:
      ceiling = matmul_ceiling(run.config.model.dtype, 1)
      found[f'{name}_mfu'] = run.flops() / seconds / ceiling
    except cost.UnknownLengthError:
      pass
    print(f'{name:16}{tokens / seconds:12,.0f} tokens/s', flush=True)
  return found
