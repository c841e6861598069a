"""Is attention of low rank? Spectra and errors, trained and random."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import ops
from efficient_attn.ops import masks
from efficient_attn.ops.low_rank.nystrom import nystrom_attention
from efficient_attn.ops.routed.clustered_attention import (
  clustered_attention,
  hamming_clusters,
)
from experiments import page
from experiments.errors import relative
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  Statement,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.sources import OURS
from experiments.survey.trained import (
  activations,
  language_model,
  texts,
  untrained,
)

LENGTH = 256
RANKS = (8, 16, 32, 64, 128)


def weights(query, key, mask=None):
  """softmax(Q K^T / sqrt(H)) [B, N, T, S]: attention to one-hot values."""
  B, S, N, _ = key.shape
  eye = jnp.broadcast_to(jnp.eye(S)[None, :, None], (B, S, N, S))
  return ops.attention(query, key, eye, mask=mask).swapaxes(1, 2)


def energy(matrix, rank: int) -> float:
  """The share of the squared singular values that the first `rank` have."""
  squares = jnp.linalg.svd(matrix, compute_uv=False) ** 2
  return float((squares[..., :rank].sum(-1) / squares.sum(-1)).mean())


def landmarks(query, key, value, rank: int):
  """Nystrom attention, its inverse exact."""
  return nystrom_attention(
    query, key, value, num_landmarks=rank, iterations=None
  )


def projected(query, key, value, rank: int):
  """Linformer with a random projection of the length to `rank` rows."""
  draw = np.random.default_rng(rank).standard_normal((rank, key.shape[1]))
  draw = jnp.asarray(draw * rank**-0.5, jnp.float32)
  key, value = (jnp.einsum('rs,bsnh->brnh', draw, x) for x in (key, value))
  return ops.attention(query, key, value)


def low_rank() -> dict:
  """R26: spectra, errors by rank, and the bound of clustered attention."""
  tokens = texts(LENGTH, 16)[:4]
  normal = np.random.default_rng(0).standard_normal((3, 4, LENGTH, 2, 32))
  names = 'query', 'key', 'value'
  layers = {
    'trained': activations(language_model(), tokens),
    'untrained': activations(untrained(), tokens),
    'normal': [dict(zip(names, jnp.asarray(normal, jnp.float32), strict=True))],
  }
  found = dict(ranks=list(RANKS), violations=0, rows=0)
  for source, activity in layers.items():
    qkv = [[layer[name] for name in names] for layer in activity]
    matrices = [weights(q, k) for q, k, _ in qkv]
    causal = [weights(q, k, masks.Causal()) for q, k, _ in qkv]
    for name, kind in ((source, causal), (f'{source}, unmasked', matrices)):
      found[f'energy {name}'] = [
        float(np.mean([energy(m, rank) for m in kind])) for rank in RANKS
      ]
    wanted = [ops.attention(*x) for x in qkv]
    for method, call in (('nystrom', landmarks), ('linformer', projected)):
      for rank in RANKS:
        errors = [
          relative(call(*x, rank), y) for x, y in zip(qkv, wanted, strict=True)
        ]
        by_rank = found.setdefault(f'{method} {source}', [])
        by_rank.append(float(np.mean(errors)))
    for (q, k, _), matrix in zip(qkv, matrices, strict=True):
      violations, rows = _bound(q, k, matrix)
      found['violations'] += violations
      found['rows'] += rows
  q, k, v = (x[:, :64] for x in qkv[0])
  exact = landmarks(q, k, v, 64)
  found['nystrom exact'] = relative(exact, ops.attention(q, k, v))
  return found


def _bound(query, key, matrix, num_clusters=16) -> tuple[int, int]:
  """Counts rows further from their cluster's than |q - q^c| |K| / sqrt(H)."""
  B, T, N, H = query.shape
  draw = jax.random.normal(jax.random.key(0), (N, H, 32))
  clusters = hamming_clusters(
    query, draw, num_clusters=num_clusters, iterations=5
  )
  eye = jnp.broadcast_to(jnp.eye(T)[None, :, None], (B, T, N, T))
  rows = clustered_attention(
    query, key, eye, clusters, num_clusters=num_clusters
  ).swapaxes(1, 2)
  chosen = jax.nn.one_hot(clusters, num_clusters)
  sums = jnp.einsum('btnc,btnh->bcnh', chosen, query)
  means = sums / jnp.maximum(chosen.sum(1).swapaxes(1, 2), 1)[..., None]
  mean = jnp.einsum('btnc,bcnh->btnh', chosen, means)
  far = jnp.linalg.norm(query - mean, axis=-1).swapaxes(1, 2)
  size = jnp.linalg.norm(key.swapaxes(1, 2), ord=2, axis=(-2, -1))
  bound = far * size[..., None] * H**-0.5
  off = jnp.linalg.norm(rows - matrix, axis=-1)
  return int((off > bound + 1e-6).sum()), off.size


def _plots(values) -> list:
  return [
    page.curves(
      {
        source: (values['ranks'], values[f'{what} {source}'])
        for source in ('trained', 'untrained', 'normal')
      },
      f'rank or landmarks, of {LENGTH}',
      label,
      f'{text}, by what queries and keys are',
      log='x',
    )
    for what, label, text in (
      ('energy', 'share of squared singular values', 'Spectra of attention'),
      ('nystrom', 'relative error of the output', 'Nystrom attention'),
      ('linformer', 'relative error of the output', 'Projections of keys'),
    )
  ]


AT = RANKS.index(32)
FEW = (
  'the source prints neither a rank nor a share: holds if an eighth of the '
  'ranks has 90 percent of the squared singular values, does not if half of '
  'them has less; else it depends on what is called low'
)


def few_ranks(v, name: str) -> str:
  """Whether few ranks have 90 percent by any reading, by some, or by none."""
  if v[f'energy {name}'][AT] > 0.9:
    return HOLDS
  half = v[f'energy {name}'][RANKS.index(LENGTH // 2)]
  return FAILS if half < 0.9 else UNDEFINED


def _shares(v, name: str) -> str:
  return listed('{:.0%} in {}', v[f'energy {name}'], RANKS)


@statement(
  'Attention matrices of a trained model are approximately low-rank',
  'FL p. 17; S003 Low-Rank Attention (Linformer)',
  'approximately low-rank',
  rule=FEW,
)
def trained_attention_has_few_ranks(v):
  masked, whole = _shares(v, 'trained'), _shares(v, 'trained, unmasked')
  return few_ranks(v, 'trained'), f'{masked}; {whole} without the causal mask'


@statement(
  'So are those of normal queries and keys', f'{OURS}, on FL p. 17', rule=FEW
)
def normal_attention_has_few_ranks(v):
  return few_ranks(v, 'normal'), _shares(v, 'normal')


def _approximates(name: str, title: str) -> Statement:
  @statement(
    f'{title} with {RANKS[AT]} approximates attention of a trained model',
    'FL p. 23-24',
    rule='relative error of the output below 0.1, put in without training and '
    'without the causal mask, which neither can have',
  )
  def error_is_small(v):
    trained, normal = v[f'{name} trained'][AT], v[f'{name} normal'][AT]
    text = f'relative error {trained:.2f} trained, {normal:.2f} normal'
    return holds(trained < 0.1), text

  return error_is_small


R26 = Claim(
  title='Attention is approximately of low rank',
  tier='b',
  measure=low_rank,
  seeds=(0,),
  parts=_plots,
  statements=(
    trained_attention_has_few_ranks,
    normal_attention_has_few_ranks,
    _approximates('nystrom', 'Nystrom attention'),
    _approximates('linformer', 'A random projection'),
    within(
      'With every token a landmark, Nystrom attention is softmax attention',
      f'{OURS}, on FL p. 24',
      '',
      'nystrom exact',
      0,
      1e-3,
    ),
    within(
      'Weights of a cluster are off by |q - q^c| |K| at most',
      'FL p. 25',
      'bound',
      'violations',
      0,
      0,
      unit='rows that break it',
    ),
  ),
)

LOW_RANK = {'R26': R26}
