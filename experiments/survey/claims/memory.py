"""What attention and its cache weigh: counted on arrays, modules and caches."""

import functools

import jax
import jax.numpy as jnp

from efficient_attn import ops
from efficient_attn.models import cost
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  equals,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.models import (
  cache_bytes,
  decode_step,
  mixer,
  parameters,
)

KIB, MIB, GIB = 2**10, 2**20, 2**30
DENSE = functools.partial(ops.attention, implementation='reference')
TABLE = {
  '1K': KIB,
  '8K': 8 * KIB,
  '32K': 32 * KIB,
  '128K': 128 * KIB,
  '1M': MIB,
}


def score_matrix() -> dict:
  """R01: the largest array of dense attention of one head in float16."""
  found = {}
  for name, length in TABLE.items():
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float16)
    found[name] = cost.largest_array(DENSE, x, x, x) * 2 / MIB
  found['elements_32K'] = found['32K'] * MIB / 2
  return found


R01 = Claim(
  title='The matrix of scores grows with the square of the length',
  tier='a',
  measure=score_matrix,
  statements=(
    *(
      equals(
        f'Scores of {name} tokens in 16 bits take {printed}',
        'S001 The Quadratic Bottleneck Problem; BLOG The Memory Explosion',
        printed,
        name,
        value,
        tolerance=1e-3,
        unit='MiB',
      )
      for name, printed, value in (
        ('1K', '2 MB', 2),
        ('8K', '128 MB', 128),
        ('32K', '2 GB', 2 * KIB),
        ('128K', '32 GB', 32 * KIB),
        ('1M', '2 TB', 2 * MIB),
      )
    ),
    equals(
      'Scores of 128K tokens take 64 GB',
      'BLOG standard_attention_explained.svg',
      '64 GB',
      '128K',
      64 * KIB,
      unit='MiB',
    ),
    equals(
      '32K tokens have a billion scores',
      'S003 Optimizations',
      '1 billion attention values',
      'elements_32K',
      1e9,
      tolerance=0.1,
    ),
  ),
)


def kv_caches() -> dict:
  """R03: caches of published shapes, all layers, 16 bits."""

  def of(tokens, layers, heads, kv_heads=None):
    layer = mixer('attention', 128 * heads, heads, num_kv_heads=kv_heads or 0)
    return layers * cache_bytes(layer, tokens) / GIB

  seventy = {kv: of(128 * KIB, 80, 64, kv) for kv in (8, 64)}
  return dict(
    as_example=of(128 * KIB, 48, 32),
    seven_mha=of(4 * KIB, 32, 32),
    seven_gqa=of(4 * KIB, 32, 32, 8),
    seventy_gqa=seventy[8],
    seventy_mha=seventy[64],
    seventy_ratio=seventy[64] / seventy[8],
  )


@statement(
  'Grouped queries give a 70B model 128K tokens on a consumer GPU',
  'BLOG Class 2, Real-World Impact',
  'consumer GPUs',
  rule='the cache fits into 24 GiB, the largest consumer GPU of its year',
)
def cache_fits_a_consumer_gpu(v):
  size = v['seventy_gqa']
  return holds(size <= 24), f'{size:.0f} GiB of cache alone'


R03 = Claim(
  title='How large the key-value cache is',
  tier='a',
  measure=kv_caches,
  statements=(
    equals(
      '128K tokens, 32 heads of 128, 48 layers need 96 GB',
      'AS p. 10',
      '96 GB',
      'as_example',
      96,
      unit='GiB',
    ),
    equals(
      'A 7B model needs about 1 GB at 4K tokens',
      'S003 KV Cache',
      '1GB',
      'seven_mha',
      1,
      tolerance=0.1,
      unit='GiB',
    ),
    equals(
      'Grouped queries (64 heads, 8 of keys) shrink a 70B cache 8 times',
      'BLOG Class 2, Real-World Impact',
      '8x',
      'seventy_ratio',
      8,
    ),
    equals(
      'With 128K tokens the cache of multi-head attention in a 70B model is '
      '40 GB',
      'BLOG compact_attention.svg',
      '40 GB',
      'seventy_mha',
      40,
      unit='GiB',
    ),
    cache_fits_a_consumer_gpu,
  ),
)

# AS table 3 at d_model 4096, 32 heads of 128: our row and its options, numbers
# in the cache per token, millions of parameters.
ROWS = {
  'MHA': ('attention', {}, 8192, 67.11),
  'MQA': ('attention', dict(num_kv_heads=1), 256, 34.60),
  'GQA-8': ('attention', dict(num_kv_heads=8), 2048, 41.94),
  'MLA': (
    'mla',
    dict(q_rank=1536, kv_rank=512, rope_dim=64, nope_dim=128, value_dim=128),
    576,
    39.06,
  ),
  'MFA': ('mfa', dict(head_dim=128), 256, 18.87),
  'TPA': ('tpa', dict(head_dim=128, q_rank=6, k_rank=2, v_rank=2), 640, 23.33),
}
D, HEADS = 4096, 32


def compact() -> dict:
  """R04: parameters and cached numbers of each row, on the module itself."""
  found = {}
  for name, (row, options, *_) in ROWS.items():
    module = mixer(row, D, HEADS, **options)
    found[f'{name} parameters'] = parameters(module) / 1e6
    one, two = (cache_bytes(module, n) // 2 for n in (1000, 2000))
    found[f'{name} cache'] = (two - one) / 1000
  return found


R04 = Claim(
  title='Compact attention: parameters and cache of each kind',
  tier='a',
  measure=compact,
  statements=tuple(
    equals(
      f'{name}: {what}',
      'AS table 3',
      f'{value:,}',
      f'{name} {key}',
      value,
      tolerance=1e-3 if key == 'parameters' else 0,
      unit=unit,
    )
    for name, (_, _, cached, million) in ROWS.items()
    for what, key, value, unit in (
      ('numbers cached per token', 'cache', cached, ''),
      ('millions of parameters per layer', 'parameters', million, 'M'),
    )
  ),
)


def latent_ratio() -> dict:
  """R05: what multi-head latent attention saves, against what."""

  def cached(row, heads, **options):
    module = mixer(row, 128 * heads, heads, **options)
    return (cache_bytes(module, 2000) - cache_bytes(module, 1000)) / 2000

  latent = cached('mla', 32, kv_rank=512, rope_dim=64)
  return {
    f'{heads} heads': cached('attention', heads) / latent
    for heads in (16, 18, 32, 128)
  } | {'8 heads of keys': cached('attention', 32, num_kv_heads=8) / latent}


@statement(
  'Latent attention compresses the cache 8 times',
  'S003 Multi-Head Latent Attention',
  '8x',
  rule='8 to a quarter against every usual baseline; not well defined if '
  'against some only',
)
def eight_times(v):
  text = listed('{:.3g}x of {}', v.values(), v)
  near = [6 <= ratio <= 10 for ratio in v.values()]
  return HOLDS if all(near) else UNDEFINED if any(near) else FAILS, text


R05 = Claim(
  title='Latent attention compresses the cache',
  tier='a',
  measure=latent_ratio,
  statements=(eight_times,),
)


def expanded_heads(heads: int) -> float:
  """FLOPs per cached token of heads with keys of 192 and values of 128."""
  flops = []
  for length in (4096, 8192):
    q, k, v = (
      jax.ShapeDtypeStruct((1, n, heads, width), jnp.float32)
      for n, width in ((1, 192), (length, 192), (length, 128))
    )
    flops.append(cost.flops(DENSE, q, k, v))
  return (flops[1] - flops[0]) / 4096


def compact_flops() -> dict:
  """R06: products per token while decoding, with and without a compact cache.

  The cost of the cached tokens: the slope between 4096 and 8192 of them, so
  that projections, which do not depend on them, drop out.
  """

  def of(row, heads, **options):
    module = mixer(row, D, heads, **options)
    costs = [decode_step(module, D, n).flops for n in (4096, 8192)]
    return (costs[1] - costs[0]) / 4096

  latent = dict(q_rank=1536, kv_rank=512, rope_dim=64)
  deep = dict(latent, nope_dim=128, value_dim=128)
  return dict(
    mqa=of('attention', HEADS, num_kv_heads=1) / of('attention', HEADS),
    gqa=of('attention', HEADS, num_kv_heads=8) / of('attention', HEADS),
    mfa=of('mfa', HEADS, head_dim=128) / of('attention', HEADS),
    mla_absorbed=of('mla', 128, **deep, absorbed=True),
    mla_scores=expanded_heads(128),
  )


@statement(
  'MLA leaves the cost per cached token as it is',
  'AS p. 10 and 17',
  '1x',
  rule='at most 5 percent more than heads of 192 and 128 channels',
)
def absorbed_queries_cost_no_more(v):
  absorbed, expanded = v['mla_absorbed'], v['mla_scores']
  text = (
    f'{absorbed / expanded:.2f}x: absorbed {absorbed:,.0f} FLOPs, expanded '
    f'heads {expanded:,.0f}'
  )
  return holds(absorbed < 1.05 * expanded), text


R06 = Claim(
  title='Compact caches do not change the cost of computing',
  tier='a',
  measure=compact_flops,
  statements=(
    *(
      within(
        f'{name} leaves the cost per cached token as it is',
        'AS p. 10 and 17',
        '1x',
        key,
        0.99,
        1.01,
        unit='of MHA',
      )
      for name, key in (('MQA', 'mqa'), ('GQA', 'gqa'), ('MFA', 'mfa'))
    ),
    absorbed_queries_cost_no_more,
  ),
)

MEMORY = {'R01': R01, 'R03': R03, 'R04': R04, 'R05': R05, 'R06': R06}
