"""Stars and savings of methods, as an index of guides gives them."""

import functools

import numpy as np
from flax import nnx

from efficient_attn.compress.prune import largest
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  UNDEFINED,
  Claim,
  Statement,
  elsewhere,
)
from experiments.survey.claims.decisions import (
  HEADS,
  LENGTHS,
  WINDOW,
  D,
  tokens,
)
from experiments.survey.encoders import Bert, Shape
from experiments.survey.models import (
  cache_bytes,
  mixer,
  parameters,
  training_pass,
)


def stars() -> dict[str, dict[str, float]]:
  """By approach: operations of training, and bytes of the decode state."""
  rows = {
    'flash': ('attention', {}),
    'grouped': ('attention', dict(num_kv_heads=2)),
    'sparse': ('window', dict(window=WINDOW)),
    'linear': ('linear', {}),
  }
  found = {}
  for name, (row, options) in rows.items():
    module = mixer(row, D, HEADS, **options)
    found[name] = dict(
      operations=training_pass(module, tokens(LENGTHS[1])).operations,
      state=cache_bytes(module, LENGTHS[1]),
    )
  return found


def distilled() -> dict[str, float]:
  """How many times smaller than BERT-base its students are."""
  students = {
    'DistilBERT': Shape(layers=6, types=0, pooler=False),
    'TinyBERT': Shape(layers=4, width=312, ffn=1200),
  }
  teacher = size(Shape())
  return {name: teacher / size(shape) for name, shape in students.items()}


def size(shape: Shape) -> int:
  """Counts the parameters of an encoder."""
  return parameters(nnx.eval_shape(functools.partial(build, shape)))


def build(shape: Shape) -> Bert:
  """Builds an encoder."""
  return Bert(shape, rngs=nnx.Rngs(0))


def kv_heads(heads: int = 32, group: int = 4) -> dict[str, float]:
  """How many times less is cached with one kv head, and with one a group."""
  whole, shared, one = (
    cache_bytes(mixer('attention', 4096, heads, num_kv_heads=kv), LENGTHS[0])
    for kv in (heads, heads // group, 1)
  )
  return dict(h=heads, g=group, mqa=whole / one, gqa=whole / shared)


def pruned(shares=(0.5, 0.75)) -> list[float]:
  """How many times smaller half and a quarter of a matrix in 16 bits are.

  Stored are the weights that are left, and a bit for each that says where.
  """
  matrix = np.random.default_rng(0).standard_normal((512, 512))
  found = []
  for share in shares:
    left = np.asarray(largest(matrix, share))
    stored = 2 * left.sum() + np.packbits(left).nbytes
    found.append(float(2 * matrix.size / stored))
  return found


def measure() -> dict:
  """R50: all of these."""
  return dict(
    stars=stars(), distilled=distilled(), kv=kv_heads(), pruned=pruned()
  )


def speed(values) -> str:
  """Both take fewer operations than FlashAttention, or one does."""
  counts = {name: row['operations'] for name, row in values['stars'].items()}
  less = [counts[name] < 0.9 * counts['flash'] for name in ('sparse', 'linear')]
  return HOLDS if all(less) else RESTATED if any(less) else FAILS


def memory(values) -> str:
  """Both keep less than FlashAttention, and sparse attention as much."""
  states = {name: row['state'] for name, row in values['stars'].items()}
  best = max(states['grouped'], states['linear'])
  if best > 0.9 * states['flash']:
    return FAILS
  return HOLDS if states['sparse'] > best else RESTATED


def shown_stars(what: str, names: tuple[str, ...]):
  """Shares of what FlashAttention takes."""

  def measured(values):
    found = values['stars']
    return ', '.join(
      f'{name} {found[name][what] / found["flash"][what]:.1%}' for name in names
    )

  return measured


def in_range(values) -> str:
  """All within; or the range is between them."""
  sizes = sorted(values['distilled'].values())
  if 5 <= sizes[0] and sizes[-1] <= 7:
    return HOLDS
  return UNDEFINED if sizes[0] < 5 and sizes[-1] > 7 else FAILS


def shown_sizes(values) -> str:
  """How much smaller each is."""
  found = values['distilled'].items()
  return ', '.join(f'{name} {ratio:.2f}x' for name, ratio in found)


def sparse_sizes(values) -> str:
  """Both within 2 to 4; or one; or none."""
  inside = [2 <= ratio <= 4 for ratio in values['pruned']]
  return HOLDS if all(inside) else UNDEFINED if any(inside) else FAILS


def shown_sparse(values) -> str:
  """How much smaller each is."""
  half, quarter = values['pruned']
  return f'{half:.2f}x without half of the weights, {quarter:.2f}x without 3/4'


def reduced(key: str, by: str):
  """Whether the cache is as many times smaller as printed."""

  def judge(values):
    found = values['kv']
    return HOLDS if abs(found[key] / found[by] - 1) < 0.01 else FAILS

  return judge


def shown_reduced(key: str, by: str):
  """The ratio and what is printed."""

  def measured(values):
    found = values['kv']
    return f'{found[key]:g}x, {by} = {found[by]}'

  return measured


STARS, TOOLS = 'S000 Efficiency Trade-offs', 'S000 Complete Efficiency Toolkit'
R50 = Claim(
  title='Stars and savings of methods',
  tier='a',
  measure=measure,
  seeds=(0,),
  statements=(
    Statement(
      says='Sparse and linear attention have five stars of speed, '
      'FlashAttention three',
      source=STARS,
      printed='5, 5, 3 stars',
      measured=shown_stars('operations', ('sparse', 'linear')),
      judge=speed,
      rule='a tenth fewer operations in training on 64K tokens',
    ),
    Statement(
      says='Grouped queries and linear attention have five stars of memory, '
      'FlashAttention and sparse attention four',
      source=STARS,
      printed='5, 5, 4, 4 stars',
      measured=shown_stars('state', ('grouped', 'linear', 'sparse')),
      judge=memory,
      rule='a tenth less in the cache of 64K tokens than FlashAttention, and '
      'less than windows of 4,096 keep; restated if these keep less than one '
      'of the two',
    ),
    *(
      elsewhere(f'{what} has {stars} of speed and memory', STARS, stars, needs)
      for what, stars, needs in (
        (
          'Quantization',
          '4 and 5 stars',
          'products of 8 and 4 bits on an accelerator; R33 rounds weights and '
          'computes in 32 bits',
        ),
        (
          'A mixture of experts',
          '4 and 2 stars',
          'layers of experts, of which this framework has none',
        ),
      )
    ),
    elsewhere(
      'Clustering attention attends to the centroids of clusters of tokens',
      'S003 Clustering Attention',
      '',
      'a method that clusters keys; clustered attention (R26) groups queries, '
      'which attend to all keys',
    ),
    Statement(
      says='Distillation makes models 5 to 7 times smaller',
      source=TOOLS,
      printed='5-7x smaller',
      measured=shown_sizes,
      judge=in_range,
      rule='both students of BERT-base, by count, in the range; not well '
      'defined if the range lies between them',
    ),
    Statement(
      says='Pruning makes models 2 to 4 times smaller',
      source=TOOLS,
      printed='2-4x smaller',
      measured=shown_sparse,
      judge=sparse_sizes,
      rule='without half and without three quarters of the weights, in 16 bits '
      'and a bit for the place of each; not well defined if one of the two',
      provenance=DERIVED,
    ),
    *(
      Statement(
        says=says,
        source='S001 Class 2: Compact Attention',
        printed=printed,
        measured=shown_reduced(key, printed[0]),
        judge=reduced(key, printed[0]),
        rule='bytes of the cache, to 1 percent, of 32 heads'
        + ' and 8 kv heads' * (key == 'gqa'),
      )
      for says, printed, key in (
        ('MQA reduces the cache of h heads h times', 'h×', 'mqa'),
        ('GQA with h / g kv heads reduces the cache g times', 'g×', 'gqa'),
      )
    ),
    elsewhere(
      'Experts train 5 times as fast',
      TOOLS,
      '5x faster training',
      'a dense model and one of experts, trained to the same quality on an '
      'accelerator',
    ),
  ),
)

TOOLKIT = {'R50': R50}
