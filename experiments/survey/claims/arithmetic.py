"""Sums of the surveys done again, on counts of modules where there are any."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import models, ops
from efficient_attn.config import LMConfig
from efficient_attn.layers.stack import Stack
from efficient_attn.models import cost
from efficient_attn.ops import masks
from efficient_attn.ops.selection import scoring
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  OPEN,
  Claim,
  Statement,
  equals,
  holds,
  listed,
  more,
  statement,
)
from experiments.survey.models import (
  GPT3,
  LLAMA,
  cache_bytes,
  forward_flops,
  mixer,
  parameters,
  training_pass,
)

# FL table 1 where the baseline is known: it, the change, and the percentage.
IMPROVED = {
  'newstest14 EN-DE': (26.03, 2.37, 9.1),
  'newstest14 EN-FR': (40.56, 1.24, 3.1),
  'ImageNet': (88.4, 0.15, 0.2),
  'SST-2': (93.2, 1.70, 1.8),
  'CoLA': (35.0, 25.5, 72.9),
  'LibriSpeech clean': (2.2, 0.3, 13.6),
  'LibriSpeech other': (5.2, 1.3, 25.0),
}
V100 = {'FL': 28e12, 'float32': 15.7e12, 'tensor cores': 125e12}  # FLOP/s
YEAR = 365.25 * 24 * 3600
CONTEXTS = tuple(2**n for n in (10, 12, 15, 17, 20))
TOKENS = (128, 512, 2048, 8192, 32_768)


def gpt3() -> dict:
  """FLOPs of training on 300 billion tokens, from a sequence of 2048."""
  tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
  sequence = training_pass(models.abstract(GPT3), tokens, wrt=0)
  flops = sequence.flops * 300e9 / 2048
  found = dict(gpt3=models.parameter_count(GPT3) / 1e9, flops=flops)
  for name, speed in V100.items():
    found[f'years {name}'] = flops / speed / YEAR
  found['dollars'] = found['years FL'] * YEAR / 3600 * 1.5 / 1e6
  return found


def pipeline(stages: int, batches: int) -> float:
  """Time of a batch cut into micro-batches, of a unit a stage when whole."""
  free, done = [0.0] * stages, 0.0
  for _ in range(batches):
    done = 0.0
    for stage in range(stages):
      done = free[stage] = max(done, free[stage]) + 1 / batches
  return done


def feed_forward(width=768) -> dict:
  """Share of the ffn in a block: parameters, and FLOPs by length."""
  config = LMConfig(
    d_model=width, num_layers=1, num_heads=12, ffn='mlp', dtype='float32'
  )
  stack = nnx.eval_shape(lambda: Stack(config, causal=False, rngs=nnx.Rngs(0)))
  block = next(stack.layers())
  found = dict(
    ffn_parameters=parameters(block.ffn) / parameters(block), ffn_flops=[]
  )
  for length in TOKENS:
    x = jax.ShapeDtypeStruct((1, length, width), jnp.float32)
    parts = [forward_flops(part, x) for part in (block.ffn, block.mixer)]
    found['ffn_flops'].append(parts[0] / sum(parts))
  return found


def hybrid() -> list[float]:
  """Cache of three KDA layers and one of MLA over that of four MLA."""
  latent = mixer('mla', 4096, 32, kv_rank=512, rope_dim=64)
  recurrent = mixer('kda', 4096, 32, expand_k=1, expand_v=1)
  shares = []
  for tokens in CONTEXTS:
    full, fixed = (cache_bytes(m, tokens) for m in (latent, recurrent))
    shares.append((3 * fixed + full) / (4 * full))
  return shares


def strict() -> dict:
  """A mask without the diagonal: plain softmax, and the framework's op."""
  x = jax.random.normal(jax.random.key(0), (3, 1, 8, 1, 4))
  mask = masks.Causal(-1)
  seen = mask.dense(8, 8)[0, 0]
  logits = jnp.where(seen, x[0, 0, :, 0] @ x[1, 0, :, 0].T, -jnp.inf)

  def ours(x):
    return ops.attention(*x, mask=mask)

  gradient = jax.grad(lambda x: ours(x).sum())(x)
  return dict(
    rows=int((~seen.any(-1)).sum()),
    nan=int(jnp.isnan(jax.nn.softmax(logits)).any(-1).sum()),
    ours=float(jnp.abs(ours(x)[0, 0]).max()),
    finite=bool(jnp.isfinite(gradient).all()),
  )


def scores(query, key, value):
  """Logits, of the same arrays as attention."""
  del value
  return scoring.logits(query, key)


def orders() -> dict:
  """FLOPs of scores, of attention and of Q (K^T V), by length."""
  lengths, found = (1024, 4096), {}
  for name, function in {
    'scores': scores,
    'reordered': functools.partial(
      ops.linear_attention, bidirectional=True, normalize=True
    ),
    'standard': functools.partial(ops.attention, implementation='reference'),
  }.items():
    counts = []
    for n in lengths:
      x = jax.ShapeDtypeStruct((1, n, 1, 64), jnp.float32)
      counts.append(cost.flops(function, x, x, x))
    found[f'{name} slope'] = slope(lengths, counts)
    found[name] = counts[-1] / 2 / lengths[-1] ** 2
  return found


def measure() -> dict:
  """R37: the figures of all of these."""
  return (
    gpt3()
    | feed_forward()
    | strict()
    | orders()
    | dict(
      improved={
        name: 100 * change / base
        for name, (base, change, _) in IMPROVED.items()
      },
      layers=1663 / 13,
      layers_each=1663 / 128 / 13,
      pipeline=pipeline(8, 1) / pipeline(8, 32),
      gpt3_gb=[b * models.parameter_count(GPT3) / 1e9 for b in (2, 4)],
      llama_gb=[b * models.parameter_count(LLAMA) / 1e9 for b in (2, 4)],
      sram=108 * 192 / 1000,
      bandwidth=19 / 2,
      hybrid=hybrid(),
    )
  )


def _tables(v) -> list:
  return [
    page.Table(
      ['tokens', 'share of the ffn in the FLOPs of a block'],
      list(zip(TOKENS, v['ffn_flops'], strict=True)),
    ),
    page.Table(
      ['tokens', 'cache of the hybrid over that of MLA alone'],
      list(zip(CONTEXTS, v['hybrid'], strict=True)),
    ),
    page.Text(
      'Block of width 768 with an ffn of 3072. Three layers of KDA (32 states '
      'of 128 x 128 in float32) and one of MLA (576 numbers a token in 16 '
      'bits), against four of MLA.',
      note=True,
    ),
  ]


@statement(
  'Relative improvements of Transformers over what came before',
  'FL p. 4, table 1',
  ', '.join(f'{row[2]}%' for row in IMPROVED.values()),
  rule='the change over the baseline, rounded; rows with a known baseline',
  provenance=DERIVED,
)
def changes_are_the_printed_percent(v):
  found = v['improved']
  near = (abs(found[n] - row[2]) < 0.06 for n, row in IMPROVED.items())
  return holds(all(near)), listed('{:.1f}%', found.values())


@statement(
  'Training GPT-3 takes 355 years on a V100',
  'FL p. 4',
  '355 years',
  rule='counted on the model and 300 billion tokens, to 5 percent; restated if '
  'only at a speed that the source does not name',
)
def gpt3_takes_355_years(v):
  near = abs(v['years FL'] / 355 - 1) <= 0.05
  text = (
    f'{v["flops"]:.3g} FLOPs: {v["years FL"]:.0f} years at 28 TFLOP/s, '
    f'{v["years float32"]:.0f} at the peak of float32, '
    f'{v["years tensor cores"]:.0f} at that of the tensor cores'
  )
  return holds(near and v['years tensor cores'] > 300, restated=near), text


@statement(
  '32 micro-batches run 4.8 times as fast as one on 8 stages',
  'FL p. 11',
  '4.8x',
  rule='not contradicted if at most the ratio of the times of the two '
  'schedules, played through without any cost of communication',
  provenance=DERIVED,
)
def schedules_allow_it(v):
  most = v['pipeline']
  return OPEN if most >= 4.8 else FAILS, f'at most {most:.2f}x'


@statement(
  'Two thirds of the computation are in the ffn',
  'FLR transformer_bottlenecks.svg',
  '2/3',
  rule='above 0.6 at all lengths; restated if at the shortest',
)
def ffn_computes_most(v):
  shares = v['ffn_flops']
  short = shares[0] >= 0.6
  verdict = holds(short and shares[-1] > 0.6, restated=short)
  return verdict, listed('{:.2f} at {}', shares, TOKENS)


@statement(
  'GPT-3 takes 700 GB and LLaMA-70B 140 GB',
  'FLR transformer_bottlenecks.svg',
  '700 GB, 140 GB',
  rule='both to 5 percent in the same precision; restated if in different ones',
)
def sizes_in_one_precision(v):
  big = [abs(gb / 700 - 1) < 0.05 for gb in v['gpt3_gb']]
  small = [abs(gb / 140 - 1) < 0.05 for gb in v['llama_gb']]
  text = (
    'GPT-3 {:.0f} GB in 16 bits, {:.0f} in 32; LLaMA-70B {:.0f}, {:.0f}'
  ).format(*v['gpt3_gb'], *v['llama_gb'])
  same = any(a and b for a, b in zip(big, small, strict=True))
  return holds(same, restated=any(big) and any(small)), text


@statement(
  'Three linear layers for one of attention keep 25 percent of the cache',
  'S003 Hybrid Architectures (Kimi Linear)',
  '25%',
  rule='26 percent or less from 4K tokens on; restated if at 1M only',
)
def hybrid_keeps_a_quarter(v):
  shares = v['hybrid']
  long = shares[-1] <= 0.26
  verdict = holds(long and shares[1] < 0.26, restated=long)
  return verdict, listed('{:.1%} at {:,}', shares, CONTEXTS)


@statement(
  'In a decoder a position sees those before it, not itself',
  'FL p. 7',
  'j < i',
  rule='every row has a key; AS eq. 7 has j <= i',
)
def every_row_has_a_key(v):
  text = (
    f'{v["rows"]} row without keys, {v["nan"]} of NaN in plain softmax; '
    f'`ops.attention` gives {v["ours"]:g} there'
  )
  return holds(not v['rows'] and not v['nan']), text


@statement(
  'Scores need n^2 computations',
  'FL p. 8',
  'n^2',
  rule='exponent of 2; restated if each score needs more than one',
)
def scores_are_quadratic(v):
  exponent, each = v['scores slope'], v['scores']
  square = abs(exponent - 2) <= 0.05
  text = f'n^{exponent:.2f}, {each:.0f} multiply-adds a score'
  return holds(square and each == 1, restated=square), text


_sum = functools.partial(equals, provenance=DERIVED)

R37 = Claim(
  title='Sums of training, pipelines, parameters and caches',
  tier='b',
  measure=measure,
  seeds=(0,),
  parts=_tables,
  statements=(
    changes_are_the_printed_percent,
    gpt3_takes_355_years,
    equals(
      'and costs 4.6 million dollars',
      'FL p. 4',
      '$4.6M',
      'dollars',
      4.6,
      tolerance=0.05,
      unit='M at $1.50 an hour',
    ),
    _sum(
      '1663 layers on 128 accelerators are 127.9 times the 13 on one',
      'FL p. 11',
      '127.9x',
      'layers',
      127.9,
      tolerance=1e-3,
      unit='x',
    ),
    _sum(
      '127 times more layers on the same hardware',
      'FLR Micro-Batching (GPipe)',
      '127x',
      'layers_each',
      127,
      unit='x on each accelerator',
    ),
    schedules_allow_it,
    equals(
      'Two thirds of the parameters are in the ffn',
      'FLR architecture_overview.svg',
      '2/3',
      'ffn_parameters',
      2 / 3,
      tolerance=0.01,
      unit='of a block',
    ),
    ffn_computes_most,
    sizes_in_one_precision,
    _sum(
      'An A100 has about 20 MB of SRAM in 108 parts of 192 KB',
      'BLOG GPU Memory Hierarchy',
      '20 MB',
      'sram',
      20,
      tolerance=0.05,
      unit='MB',
    ),
    _sum(
      'It is 10 times as fast as HBM: 19 and 2 TB/s',
      'BLOG GPU Memory Hierarchy',
      '10x',
      'bandwidth',
      10,
      tolerance=0.06,
      unit='x',
    ),
    hybrid_keeps_a_quarter,
    every_row_has_a_key,
    scores_are_quadratic,
    Statement(
      says='Standard attention is Q (K^T V)',
      source='FLR Kernel-based Linear Attention',
      printed='O(n²)',
      measured=(
        'FLOPs n^{reordered slope:.2f} in that order, of linear attention, '
        'n^{standard slope:.2f} as (Q K^T) V, of attention'
      ).format_map,
      judge=more('reordered slope', than=1.5),
      rule='exponent above 1.5 as written',
    ),
  ),
)

ARITHMETIC = {'R37': R37}
