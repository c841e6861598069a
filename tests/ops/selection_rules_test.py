"""Every selector follows its rule: against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.selection import SELECTORS, blocks, tokens
from tests.oracles import selection as oracle
from tests.oracles import selection_video as video_oracle

S, N, K, H = 24, 4, 2, 6
GRID = (2, 4, 3)
PATTERN = dict(sinks=2, window=5)
LINES = dict(last=4, num_vertical=3, num_slash=3)
TILES = dict(block_size=4, top_k=2)
FLEX = dict(block_size=4, coverage=0.5)

# Options of one case or more for every row.
CASES = {
  'streaming_llm': [PATTERN],
  'sample_attention': [dict(sample=0.2, window=0.1, coverage=0.5)],
  'sparge': [
    dict(block_q=4, block_k=2, coverage=0.5, similarity=-1.0),
    dict(block_q=4, block_k=4, coverage=0.3, similarity=0.25),
    dict(block_q=4, block_k=4, coverage=0.8, similarity=0.2, skip_below=-0.9),
  ],
  'minference': [
    dict(streaming_llm=PATTERN, vertical_slash=LINES, block_sparse=TILES)
  ],
  'minference_vertical_slash': [LINES],
  'minference_block_sparse': [TILES],
  'flex_prefill': [FLEX | dict(divergence=d) for d in (0.0, 0.12, 1.0)],
  'xattention': [
    dict(block_size=4, stride=2, coverage=0.4),
    dict(block_size=6, stride=3, coverage=0.6),
  ],
  'quest': [dict(page_size=4, top_k=3), dict(page_size=5, top_k=1)],
  'sparq': [dict(rank=2, top_k=5, local=2), dict(rank=3, top_k=4, local=0)],
  'loki': [dict(rank=2, top_k=5)],
  'magicpig': [dict(num_bits=2, num_tables=5, sinks=1, window=2)],
  'infllm': [dict(block_size=3, representatives=2, sinks=1, window=4, top_k=2)],
  'retrieval': [dict(sinks=2, window=3, top_k=4)],
  'chai': [dict(num_clusters=2), dict(num_clusters=3, probe=7)],
  'svg': [dict(grid=GRID, window=w, sample=0.3) for w in (0.1, 0.3)],
  'svg2': [
    dict(
      grid=GRID,
      query_clusters=4,
      key_clusters=6,
      coverage=0.6,
      iterations=3,
    )
  ],
  'vmoba': [dict(grid=GRID, tile=(1, 2, 3), coverage=0.3)],
  'draft_attention': [dict(grid=GRID, patch=(2, 1), share=0.2)],
  'paro': [dict(grid=GRID, block_size=4, share=0.2, mass=0.6)],
  'dit_fast_attention': [dict(window=4)],
  'fps': [dict(grid=GRID, tile=(1, 2, 1), window=(2, 1, 2))],
}


def test_every_row_has_a_case():
  assert set(CASES) == set(SELECTORS)


def make(T=S, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (T, N, H), (S, K, H), (S, K, 3)
  query, key, value = (rng.standard_normal(shape) for shape in shapes)
  # Neighbours alike, so that means of blocks mean something.
  key += np.repeat(rng.standard_normal((S // 4, K, H)), 4, axis=0)
  query[..., :2] *= 3
  return query, key, value


def found(name, options, T):
  """What a row selects of `make(T)`, as numpy arrays."""
  row = SELECTORS[name]
  query, key, value = (jnp.asarray(x)[None] for x in make(T))

  def run(query, key, value):
    arrays = (query, key, value) if row.needs_value else (query, key)
    result = row.select(*arrays, **options)
    if row.returns == 'heads':
      return result
    mask, bias = result if row.returns == 'mask and bias' else (result, None)
    mask = jnp.broadcast_to(mask.dense(T, S), (1, N, T, S))
    return mask if bias is None else (mask, bias.dense(T, S))

  result = jax.jit(run)(query, key, value)
  return jax.tree.map(lambda x: np.asarray(x)[0], result)


def expected(name, options, T):
  query, key, value = make(T)
  if name == 'svg':
    rows = np.random.default_rng(0).permutation(S)
    rows = np.sort(rows[: int(np.ceil(options['sample'] * S))])
    options = {k: v for k, v in options.items() if k != 'sample'}
    return video_oracle.svg(query, key, value, rows=rows, **options)
  if name == 'magicpig':
    options = dict(options)
    shape = options.pop('num_bits'), options.pop('num_tables'), H
    planes = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    return oracle.magicpig(query, key, np.asarray(planes), **options)
  module = video_oracle if SELECTORS[name].sees == 'grid' else oracle
  result = getattr(module, name.removeprefix('minference_'))(
    query, key, **options
  )
  return result[0] if name in ('flex_prefill', 'paro') else result


@pytest.mark.parametrize(
  'name, case',
  [(name, i) for name, cases in CASES.items() for i in range(len(cases))],
)
def test_follows_the_rule(name, case):
  options = CASES[name][case]
  lengths = [S]
  if SELECTORS[name].sees == 'token' and name not in ('infllm', 'chai'):
    lengths.append(3)  # the last queries alone
  for T in lengths:
    with jax.enable_x64(True):
      results = found(name, options, T), expected(name, options, T)
    if name == 'magicpig':
      (mask, bias), (wanted, u) = results
      np.testing.assert_array_equal(mask, wanted)
      np.testing.assert_allclose(
        bias[mask], -np.log(u[mask]), rtol=1e-9, atol=1e-12
      )
    else:
      np.testing.assert_array_equal(*results)
      assert len(np.unique(results[1])) > 1  # neither all nor nothing


def test_flex_prefill_tells_heads_apart():
  query, key, _ = make()
  kinds = [
    oracle.flex_prefill(query, key, **options)[1]
    for options in CASES['flex_prefill']
  ]
  assert set(kinds[0]) == {'lines'} and set(kinds[2]) == {'blocks'}
  assert set(kinds[1]) == {'lines', 'blocks'}


def test_xattention_sums_antidiagonals():
  """To 1e-12 in float64, for every stride."""
  query, key, _ = make()
  strides = (1, 2, 3, 4, 8, 24)

  def run(query, key):
    return [blocks.antidiagonal_sums(query, key, s)[0] for s in strides]

  with jax.enable_x64(True):
    run = jax.jit(run)
    results = run(query[None], key[None])
  for stride, result in zip(strides, results, strict=True):
    wanted = oracle.antidiagonal_sums(query, key, stride)
    np.testing.assert_allclose(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
  'name, options, message',
  [
    ('minference_block_sparse', dict(block_size=5, top_k=1), 'blocks of 5'),
    ('xattention', dict(block_size=12, stride=8), 'blocks of 8 do not divide'),
    ('xattention', dict(block_size=10, stride=2), 'blocks of 10 do not divide'),
    ('fps', dict(grid=(2, 4, 4), tile=(1, 1, 1), window=(1, 1, 1)), '32 tok'),
    ('fps', dict(grid=GRID, tile=(1, 3, 1), window=(1, 1, 1)), 'blocks of 3'),
    ('chai', dict(num_clusters=9), 'between 1 and the N = 4'),
  ],
)
def test_errors(name, options, message):
  query, key, _ = (jnp.asarray(x, jnp.float32)[None] for x in make())
  with pytest.raises(ValueError, match=message):
    SELECTORS[name].select(query, key, **options)


def test_queries_must_be_the_last_of_the_keys():
  query, key, _ = (jnp.asarray(x, jnp.float32)[None] for x in make())
  with pytest.raises(ValueError, match='with T <= S'):
    tokens.select_quest(query, key[:, :7])
  with pytest.raises(ValueError, match='query has T = 3'):
    tokens.select_infllm(query[:, -3:], key, block_size=3)
