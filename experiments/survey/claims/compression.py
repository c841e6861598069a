"""Sizes of compressed models, counted on modules that hold no arrays."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import models
from efficient_attn.config import EncoderDecoderConfig
from efficient_attn.layers.embed import Embed
from efficient_attn.layers.ffn import GLU
from efficient_attn.layers.param import LowRank, Projection
from experiments import page
from experiments.benchmarks.timing import interleaved
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  OPEN,
  Claim,
  Statement,
  equals,
  holds,
  listed,
  statement,
)
from experiments.survey.encoders import Bert, Shape
from experiments.survey.models import SEVEN_B, forward_flops, parameters

ALBERT = dict(vocab=30_000, embed=128, shared=True)
ENCODERS = {
  'BERT-base': Shape(),
  'BERT-large': Shape(layers=24, width=1024, heads=16, ffn=4096),
  'DistilBERT': Shape(layers=6, types=0, pooler=False),
  'TinyBERT-4': Shape(layers=4, width=312, ffn=1200),
  'ALBERT-base': Shape(**ALBERT),
  'ALBERT-large': Shape(layers=24, width=1024, heads=16, ffn=4096, **ALBERT),
  'ALBERT-xxlarge': Shape(width=4096, heads=64, ffn=16_384, **ALBERT),
}
# MobileBERT (2004.02984): shapes of the matrices and vectors outside of the 24
# layers, and of one layer, with how many there are.
MOBILE = {
  (30_522, 128): 1,
  (3 * 128, 512): 1,
  (512, 512): 1,
  (2, 512): 1,
  (512,): 3,
}
MOBILE_LAYER = {
  (512, 128): 3 + 4,  # two bottlenecks, values; out of four ffns
  (128, 128): 3,  # queries, keys, out
  (128, 512): 4 + 1,  # into four ffns; out of the bottleneck
  (128,): 2 * 3 + 1 + 2 + 3 + 4 * 3,  # biases and the two vectors of norms
  (512,): 4 + 3,
}


TOKENS = 128
TIMED = ('BERT-base', 'DistilBERT', 'TinyBERT-4')


def shapes(make) -> nnx.Module:
  """The module that `make` builds from seeds, without arrays."""
  return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def encoders() -> dict:
  """Parameters of the encoders, FLOPs of 128 tokens, and both over BERT's."""
  found = {}
  tokens = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
  for name, shape in ENCODERS.items():
    model = shapes(functools.partial(Bert, shape))
    found[name] = dict(
      millions=parameters(model) / 1e6, flops=forward_flops(model, tokens)
    )
  layers = 24 * sum(math.prod(shape) * n for shape, n in MOBILE_LAYER.items())
  outside = sum(math.prod(shape) * n for shape, n in MOBILE.items())
  found['MobileBERT'] = dict(millions=(layers + outside) / 1e6)
  for row in found.values():
    row['smaller'] = found['BERT-base']['millions'] / row['millions']
    if 'flops' in row:
      row['fewer'] = found['BERT-base']['flops'] / row['flops']
  return found


def seconds() -> dict[str, float]:
  """Forward passes of the same shapes with a vocabulary of 1000."""
  tokens = jnp.zeros((1, TOKENS), jnp.int32)
  calls = {}
  for name in TIMED:
    shape = dataclasses.replace(ENCODERS[name], vocab=1000)
    graphdef, params = nnx.split(shapes(functools.partial(Bert, shape)))
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.01, p.dtype), params)
    call = jax.jit(lambda p, x, g=graphdef: nnx.merge(g, p)(x))
    calls[name] = functools.partial(call, params, tokens)
  return interleaved(calls, 5)


def language_models() -> dict:
  """Parameters, in billions, of models and of what is added to them."""
  heads = {'heads': 32, 'head_dim': 128}
  lora = {
    rank: parameters(shapes(functools.partial(LowRank, 4096, rank, heads)))
    for rank in (8, 16)
  }
  experts = dict(ffn_dim=14_336, mixers={'attention': dict(num_kv_heads=8)})
  dense = models.parameter_count(dataclasses.replace(SEVEN_B, **experts))
  expert = parameters(shapes(functools.partial(GLU, 4096, 14_336, jax.nn.silu)))
  router = parameters(
    shapes(functools.partial(Projection, {'embed': 4096}, {'experts': 8}))
  )
  first = EncoderDecoderConfig(
    d_model=512,
    num_layers=6,
    num_heads=8,
    vocab_size=37_000,
    ffn='mlp',
    norm='layernorm',
    norm_position='post',
    position='sinusoidal',
  )
  found = dict(
    seven=models.parameter_count(SEVEN_B),
    lora=2 * 32 * lora[8],  # queries and values of 32 layers
    lora16=2 * 32 * lora[16],
    mixtral=dense + 32 * (7 * expert + router),
    active=dense + 32 * (expert + router),
    first=models.parameter_count(first),
  )
  return {name: count / 1e9 for name, count in found.items()}


def measure() -> dict:
  """R34: sizes of compressed models."""
  found = dict(encoders=encoders(), seconds=seconds()) | language_models()
  size = {name: row['millions'] for name, row in found['encoders'].items()}
  words = shapes(functools.partial(Embed, 30_000, 768))
  albert = shapes(functools.partial(Bert, ENCODERS['ALBERT-base']))
  split = parameters(albert.encoder.embed) + parameters(albert.encoder.widen)
  return (
    found
    | dict(
      accelerator=jax.default_backend() != 'cpu',
      embeddings=parameters(words) / split,
      albert_base=size['BERT-base'] / size['ALBERT-base'],
      albert_large=size['BERT-large'] / size['ALBERT-large'],
      xxlarge=size['ALBERT-xxlarge'],
      distilled=100 * (1 - size['DistilBERT'] / size['BERT-base']),
      pipeline=4 * size['BERT-large'] / (size['DistilBERT'] / 2),
      lora_percent=[
        100 * found[k] / found['seven'] for k in ('lora', 'lora16')
      ],
      first_millions=1000 * found['first'],
    )
    | {
      f'{name} smaller': row['smaller']
      for name, row in found['encoders'].items()
    }
  )


def _table(v) -> list:
  base = v['seconds']['BERT-base']
  rows = [
    [
      name,
      row['millions'],
      row['smaller'],
      row.get('fewer', ''),
      base / v['seconds'][name] if name in v['seconds'] else '',
    ]
    for name, row in v['encoders'].items()
  ]
  head = ['model', 'millions', 'times smaller', 'times fewer FLOPs']
  return [
    page.Table([*head, 'times faster'], rows),
    page.Text(
      f'Against BERT-base, {TOKENS} tokens; the time is that of this device.',
      note=True,
    ),
  ]


def _speed(says: str, name: str, times: float) -> Statement:
  @statement(
    says,
    'FL p. 10, table 2',
    f'{times}x',
    rule=f'within 15 percent on an accelerator, {TOKENS} tokens; elsewhere not '
    'contradicted unless the products have fewer FLOPs by less',
  )
  def flops_and_seconds_allow_it(v):
    fewer = v['encoders'][name]['fewer']
    text = f'{fewer:.2f}x fewer FLOPs'
    if not v['accelerator']:
      return OPEN if fewer >= times else FAILS, text
    faster = v['seconds']['BERT-base'] / v['seconds'][name]
    near = abs(faster / times - 1) < 0.15
    return holds(fewer >= times and near), f'{faster:.2f}x, {text}'

  return flops_and_seconds_allow_it


def _size(says, source, key, value, unit, **options) -> Statement:
  return equals(
    says,
    source,
    f'{value}{unit}',
    key,
    value,
    tolerance=0.05,
    unit=unit,
    **options,
  )


@statement(
  'ALBERT has 12 to 18 times fewer parameters',
  'FLR Weight Sharing',
  '12-18x',
  rule='base and large against BERT of the same size, to 5 percent; restated '
  'if the two lie around the range',
)
def albert_is_smaller(v):
  base, large = v['albert_base'], v['albert_large']
  verdict = holds(11.4 < base and large < 18.9, restated=base < 12 < 18 < large)
  return verdict, f'{base:.2f}x (base), {large:.2f}x (large)'


@statement(
  '18 times fewer parameters are 89 percent fewer',
  'FLR weight_sharing.svg',
  '18x, 89%',
  rule='within 2 points for ALBERT-large, the one with 18 times',
)
def albert_large_has_89_percent_fewer(v):
  times = v['albert_large'], v['albert_base']
  fewer = [1 - 1 / x for x in times]
  text = listed('{:.2f}x is {:.1%}', times, fewer)
  return holds(abs(fewer[0] - 0.89) < 0.02), text


@statement(
  'LoRA trains 0.1 percent of the parameters',
  'FLR Weight Sharing',
  '0.1%',
  rule='0.1 percent lies between rank 8 and 16',
)
def low_ranks_are_a_thousandth(v):
  eight, sixteen = v['lora_percent']
  text = (
    f'{eight:.3f}% at rank 8, {sixteen:.3f}% at 16, for queries and values of '
    'a 7B model'
  )
  return holds(eight < 0.1 <= sixteen), text


R34 = Claim(
  title='How small compressed models are',
  tier='b',
  measure=measure,
  parts=_table,
  statements=(
    _size(
      'DistilBERT is 1.7 times smaller than BERT',
      'FL p. 10, table 2',
      'DistilBERT smaller',
      1.7,
      'x',
    ),
    _size(
      'TinyBERT is 7.5 times smaller',
      'FL p. 10, table 2',
      'TinyBERT-4 smaller',
      7.5,
      'x',
    ),
    _size(
      'MobileBERT is 4.3 times smaller',
      'MobileBERT abstract',
      'MobileBERT smaller',
      4.3,
      'x',
      provenance=DERIVED,
    ),
    _size(
      'DistilBERT is 60 percent smaller',
      'FLR knowledge_distillation.svg',
      'distilled',
      60,
      '%',
    ),
    _size(
      'DistilBERT is 40 percent smaller',
      'FLR Knowledge Distillation',
      'distilled',
      40,
      '%',
    ),
    _size(
      'Factorised embeddings are 6 times smaller',
      'FLR Weight Sharing',
      'embeddings',
      6,
      'x',
    ),
    _size(
      'ALBERT-xxlarge has 235M parameters',
      'FLR general_methods_formulas.svg',
      'xxlarge',
      235,
      'M',
    ),
    _size(
      '340M, distilled to 66M, pruned to 33M, in INT8: 40 times',
      'FLR Recommended Pipeline',
      'pipeline',
      40,
      'x',
      provenance=DERIVED,
    ),
    _size(
      'The same chain: 85 times',
      'FLR combined_approach.svg',
      'pipeline',
      85,
      'x',
      provenance=DERIVED,
    ),
    _size(
      'Mixtral 8x7B has 47B parameters',
      'S003 Mixture of Experts',
      'mixtral',
      47,
      'B',
    ),
    _size(
      'and uses 13B of them for a token',
      'S003 Mixture of Experts',
      'active',
      13,
      'B',
    ),
    _size(
      'The first Transformer had 65M parameters',
      'S003 Evolution Timeline',
      'first_millions',
      65,
      'M',
    ),
    albert_is_smaller,
    albert_large_has_89_percent_fewer,
    low_ranks_are_a_thousandth,
    _speed('DistilBERT is 1.6 times as fast', 'DistilBERT', 1.6),
    _speed('TinyBERT is 9.4 times as fast', 'TinyBERT-4', 9.4),
  ),
)

COMPRESSION = {'R34': R34}
