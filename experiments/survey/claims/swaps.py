"""What a trained model loses when its attention is exchanged untrained."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import ops
from efficient_attn.compress.prune import pruned
from efficient_attn.ops import masks
from experiments.errors import relative
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
  within,
)
from experiments.survey.trained import (
  CONFIG,
  activations,
  language_model,
  losses,
  texts,
  untrained,
  with_mixer,
)

LENGTH, COUNT, WINDOW, NARROW = 256, 32, 64, 16
HEADS = CONFIG['model']['num_heads']


def changed(model: nnx.Module, change: Callable) -> nnx.Module:
  """The model with change(path, array) of every parameter."""
  graphdef, params = nnx.split(model)
  params = jax.tree_util.tree_map_with_path(change, params)
  return nnx.merge(graphdef, params)


def shared(model: nnx.Module) -> nnx.Module:
  """The model with one kv head in place of all: their mean, as for GQA."""

  def mean(path, x):
    names = [getattr(part, 'key', '') for part in path]
    if 'mixer' not in names or not {'key', 'value'} & set(names):
      return x
    axis = x.shape.index(HEADS)
    return jnp.mean(x, axis, keepdims=True)

  return with_mixer(changed(model, mean), 'attention', num_kv_heads=1)


def swapped() -> dict[str, float]:
  """Nats per byte with each mixer in the place of trained attention."""
  model, tokens = language_model(), texts(LENGTH + 1, COUNT)
  made = {
    'attention': model,
    'tiled': with_mixer(model, 'attention', implementation='blockwise'),
    'one kv head': shared(model),
    'window': with_mixer(model, 'window', window=WINDOW),
    'narrow window': with_mixer(model, 'window', window=NARROW),
    'linear': with_mixer(model, 'linear'),
    'pruned': pruned(model, 0.5),
    'untrained': untrained(),
  }
  return {name: float(losses(x, tokens).mean()) for name, x in made.items()}


def errors() -> dict[str, float]:
  """Errors of outputs on the queries, keys and values of the trained model."""
  layers = activations(language_model(), texts(LENGTH, COUNT)[:4])
  methods = {'window': sparse, 'linear': linear}
  found = {}
  for name, method in methods.items():
    off = [
      relative(
        method(*(layer[k] for k in ('query', 'key', 'value'))),
        ops.attention(
          layer['query'], layer['key'], layer['value'], mask=masks.Causal()
        ),
      )
      for layer in layers
    ]
    found[f'{name} error'] = float(np.mean(off))
  return found


def sparse(query, key, value):
  """Attends to the last WINDOW tokens."""
  return ops.attention(query, key, value, mask=masks.Window(WINDOW - 1, 0))


def linear(query, key, value):
  """Takes weights of elu(q) + 1 and elu(k) + 1."""
  features = (jax.nn.elu(x) + 1 for x in (query, key))
  return ops.linear_attention(*features, value, normalize=True)[0]


def measure() -> dict:
  """R48: losses and errors."""
  return swapped() | errors()


SOME = 0.05  # of the loss: far more than a second run differs by
GUIDE = 'S000 Efficiency Trade-offs'
TABLE = 'S001 Complexity Comparison'


def worse(values, name: str) -> float:
  """The part that the loss grows by."""
  return values[name] / values['attention'] - 1


def shown(*names: str):
  """How losses are shown beside that of attention."""

  def measured(values):
    found = ', '.join(f'{values[name]:.3f} {name}' for name in names)
    return f'{found}, {values["attention"]:.3f} nats per byte before'

  return measured


def dropped_in(values) -> str:
  """The loss is the same."""
  return HOLDS if abs(worse(values, 'tiled')) < 1e-4 else FAILS


def suffers(name: str, narrower: str = ''):
  """The loss grows by SOME; or only where less is left."""

  def judge(values):
    if worse(values, name) > SOME:
      return HOLDS
    restated = narrower and worse(values, narrower) > SOME
    return RESTATED if restated else FAILS

  return judge


def forgotten(values) -> float:
  """The part of what was learned that linear attention loses."""
  learned = values['untrained'] - values['attention']
  return (values['linear'] - values['attention']) / learned


def shown_forgotten(values) -> str:
  """The part."""
  return (
    f'{values["linear"]:.3f} nats per byte, {values["attention"]:.3f} before, '
    f'{values["untrained"]:.3f} untrained: {forgotten(values):.0%} is lost'
  )


def begins_anew(values) -> str:
  """Half of what was learned is lost; or some."""
  if forgotten(values) > 0.5:
    return HOLDS
  return RESTATED if worse(values, 'linear') > SOME else FAILS


def approximates(says: str, key: str) -> Statement:
  """Whether outputs are nearer to those of attention than to zero."""
  return within(
    says,
    TABLE,
    'Approximate',
    key,
    1e-3,
    0.5,
    unit='of the outputs',
    reason='an error of one is that of zeros, and exact would be rounding; on '
    'queries, keys and values of the trained model',
  )


WITHOUT = f'the loss grows by more than {SOME:.0%} without training'
R48 = Claim(
  title='Attention exchanged in a trained model',
  tier='b',
  measure=measure,
  seeds=(0,),
  statements=(
    Statement(
      says='FlashAttention is a drop-in',
      source=GUIDE,
      printed='Drop-in',
      measured=shown('tiled'),
      judge=dropped_in,
      rule='the loss changes by less than 1e-4 of it',
    ),
    Statement(
      says='Grouped and single kv heads need retraining',
      source=GUIDE,
      printed='Retrain',
      measured=shown('one kv head'),
      judge=suffers('one kv head'),
      rule=f'{WITHOUT}, with the mean of the kv heads for all',
    ),
    Statement(
      says='Sparse attention needs retraining',
      source=GUIDE,
      printed='Retrain',
      measured=shown('window', 'narrow window'),
      judge=suffers('window', 'narrow window'),
      rule=f'{WITHOUT}, with windows of {WINDOW} of {LENGTH} tokens; restated '
      f'if only with those of {NARROW}',
    ),
    Statement(
      says='Linear attention needs training from the start',
      source=GUIDE,
      printed='Full train',
      measured=shown_forgotten,
      judge=begins_anew,
      rule='more than half of what was learned is lost; restated if the loss '
      f'grows by more than {SOME:.0%}',
    ),
    Statement(
      says='Pruning needs fine-tuning',
      source=GUIDE,
      printed='Fine-tune',
      measured=shown('pruned'),
      judge=suffers('pruned'),
      rule=f'{WITHOUT}, less the smaller half of every matrix',
    ),
    approximates('Sparse attention approximates attention', 'window error'),
    approximates('Linear attention approximates attention', 'linear error'),
  ),
)

SWAPS = {'R48': R48}
