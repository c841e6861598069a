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
  HOLDS,
  OPEN,
  RESTATED,
  Claim,
  Statement,
  equals,
)
from experiments.survey.models import (
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
GPT3 = LMConfig(
  d_model=12_288,
  num_layers=96,
  num_heads=96,
  vocab_size=50_257,
  ffn='mlp',
  norm='layernorm',
  position='learned',
  mixers={'attention': dict(position='none')},
  dtype='bfloat16',
)
LLAMA = LMConfig(
  d_model=8192,
  num_layers=80,
  num_heads=64,
  ffn_dim=28_672,
  vocab_size=32_000,
  mixers={'attention': dict(num_kv_heads=8)},
  tie_embeddings=False,
)
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
  block = stack.periods[0].blocks[0]
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


def orders() -> dict:
  """FLOPs of scores, of attention and of Q (K^T V), by length."""
  lengths, found = (1024, 4096), {}
  for name, function in {
    'scores': lambda q, k, v: scoring.logits(q, k),
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


R37 = Claim(
  title='Sums of training, pipelines, parameters and caches',
  tier='b',
  measure=measure,
  seeds=(0,),
  parts=_tables,
  statements=(
    Statement(
      says='Relative improvements of Transformers over what came before',
      source='FL p. 4, table 1',
      printed=', '.join(f'{row[2]}%' for row in IMPROVED.values()),
      measured=lambda v: ', '.join(f'{x:.1f}%' for x in v['improved'].values()),
      judge=lambda v: (
        HOLDS
        if all(
          abs(v['improved'][name] - row[2]) < 0.06
          for name, row in IMPROVED.items()
        )
        else FAILS
      ),
      rule='the change over the baseline, rounded; rows with a known baseline',
      provenance=DERIVED,
    ),
    Statement(
      says='Training GPT-3 takes 355 years on a V100',
      source='FL p. 4',
      printed='355 years',
      measured=lambda v: (
        f'{v["flops"]:.3g} FLOPs: {v["years FL"]:.0f} years at 28 TFLOP/s, '
        f'{v["years float32"]:.0f} at the peak of float32, '
        f'{v["years tensor cores"]:.0f} at that of the tensor cores'
      ),
      judge=lambda v: (
        FAILS
        if abs(v['years FL'] / 355 - 1) > 0.05
        else HOLDS
        if v['years tensor cores'] > 300
        else RESTATED
      ),
      rule='counted on the model and 300 billion tokens, to 5 percent; '
      'restated if only at a speed that the source does not name',
    ),
    equals(
      'and costs 4.6 million dollars',
      'FL p. 4',
      '$4.6M',
      'dollars',
      4.6,
      tolerance=0.05,
      unit='M at $1.50 an hour',
    ),
    equals(
      '1663 layers on 128 accelerators are 127.9 times the 13 on one',
      'FL p. 11',
      '127.9x',
      'layers',
      127.9,
      tolerance=1e-3,
      unit='x',
      provenance=DERIVED,
    ),
    equals(
      '127 times more layers on the same hardware',
      'FLR Micro-Batching (GPipe)',
      '127x',
      'layers_each',
      127,
      unit='x on each accelerator',
      provenance=DERIVED,
    ),
    Statement(
      says='32 micro-batches run 4.8 times as fast as one on 8 stages',
      source='FL p. 11',
      printed='4.8x',
      measured=lambda v: f'at most {v["pipeline"]:.2f}x',
      judge=lambda v: OPEN if v['pipeline'] >= 4.8 else FAILS,
      rule='not contradicted if at most the ratio of the times of the two '
      'schedules, played through without any cost of communication',
      provenance=DERIVED,
    ),
    equals(
      'Two thirds of the parameters are in the ffn',
      'FLR architecture_overview.svg',
      '2/3',
      'ffn_parameters',
      2 / 3,
      tolerance=0.01,
      unit='of a block',
    ),
    Statement(
      says='Two thirds of the computation are in the ffn',
      source='FLR transformer_bottlenecks.svg',
      printed='2/3',
      measured=lambda v: ', '.join(
        f'{x:.2f} at {n}' for n, x in zip(TOKENS, v['ffn_flops'], strict=True)
      ),
      judge=lambda v: (
        FAILS
        if v['ffn_flops'][0] < 0.6
        else HOLDS
        if v['ffn_flops'][-1] > 0.6
        else RESTATED
      ),
      rule='above 0.6 at all lengths; restated if at the shortest',
    ),
    Statement(
      says='GPT-3 takes 700 GB and LLaMA-70B 140 GB',
      source='FLR transformer_bottlenecks.svg',
      printed='700 GB, 140 GB',
      measured=lambda v: (
        'GPT-3 {:.0f} GB in 16 bits, {:.0f} in 32; '
        'LLaMA-70B {:.0f}, {:.0f}'.format(*v['gpt3_gb'], *v['llama_gb'])
      ),
      judge=lambda v: next(
        (
          verdict
          for verdict, (i, j) in (
            (HOLDS, (0, 0)),
            (HOLDS, (1, 1)),
            (RESTATED, (1, 0)),
            (RESTATED, (0, 1)),
          )
          if abs(v['gpt3_gb'][i] / 700 - 1) < 0.05
          and abs(v['llama_gb'][j] / 140 - 1) < 0.05
        ),
        FAILS,
      ),
      rule='both to 5 percent in the same precision; restated if in different '
      'ones',
    ),
    equals(
      'An A100 has about 20 MB of SRAM in 108 parts of 192 KB',
      'BLOG GPU Memory Hierarchy',
      '20 MB',
      'sram',
      20,
      tolerance=0.05,
      unit='MB',
      provenance=DERIVED,
    ),
    equals(
      'It is 10 times as fast as HBM: 19 and 2 TB/s',
      'BLOG GPU Memory Hierarchy',
      '10x',
      'bandwidth',
      10,
      tolerance=0.06,
      unit='x',
      provenance=DERIVED,
    ),
    Statement(
      says='Three linear layers for one of attention keep 25 percent of the '
      'cache',
      source='S003 Hybrid Architectures (Kimi Linear)',
      printed='25%',
      measured=lambda v: ', '.join(
        f'{x:.1%} at {n:,}' for n, x in zip(CONTEXTS, v['hybrid'], strict=True)
      ),
      judge=lambda v: (
        FAILS
        if v['hybrid'][-1] > 0.26
        else HOLDS
        if v['hybrid'][1] < 0.26
        else RESTATED
      ),
      rule='26 percent or less from 4K tokens on; restated if at 1M only',
    ),
    Statement(
      says='In a decoder a position sees those before it, not itself',
      source='FL p. 7',
      printed='j < i',
      measured=lambda v: (
        f'{v["rows"]} row without keys, {v["nan"]} of NaN in plain softmax; '
        f'`ops.attention` gives {v["ours"]:g} there'
      ),
      judge=lambda v: FAILS if v['rows'] or v['nan'] else HOLDS,
      rule='every row has a key; AS eq. 7 has j <= i',
    ),
    Statement(
      says='Scores need n^2 computations',
      source='FL p. 8',
      printed='n^2',
      measured=lambda v: (
        f'n^{v["scores slope"]:.2f}, {v["scores"]:.0f} multiply-adds a score'
      ),
      judge=lambda v: (
        FAILS
        if abs(v['scores slope'] - 2) > 0.05
        else HOLDS
        if v['scores'] == 1
        else RESTATED
      ),
      rule='exponent of 2; restated if each score needs more than one',
    ),
    Statement(
      says='Standard attention is Q (K^T V)',
      source='FLR Kernel-based Linear Attention',
      printed='O(n²)',
      measured=lambda v: (
        f'FLOPs n^{v["reordered slope"]:.2f} in that order, of linear '
        f'attention, n^{v["standard slope"]:.2f} as (Q K^T) V, of attention'
      ),
      judge=lambda v: HOLDS if v['reordered slope'] > 1.5 else FAILS,
      rule='exponent above 1.5 as written',
    ),
  ),
)

ARITHMETIC = {'R37': R37}
