"""What a guide to attention says of its steps, kinds, scores and choices."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import ops
from efficient_attn.models import cost
from efficient_attn.ops import masks
from efficient_attn.ops.softmax import normalizers, score_functions
from experiments.errors import largest
from experiments.survey import oracles
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  Claim,
  Statement,
  within,
)
from experiments.survey.sources import OURS

# Tokens of the target and of the source, heads, and channels of a head.
N, M, HEADS, H = 24, 40, 4, 16


def draw(length: int, heads: int = HEADS, seed: int = 0) -> jax.Array:
  """Normal queries, keys or values."""
  rng = np.random.default_rng(seed)
  shape = (1, length, heads, H)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def weights(query, key, mask=None) -> np.ndarray:
  """The weights of every head, read off by values of one-hot vectors."""
  size, heads = key.shape[1:3]
  eye = jnp.broadcast_to(jnp.eye(size)[:, None], (1, size, heads, size))
  out = ops.attention(query, key, eye, mask=mask)
  return np.asarray(out[0].swapaxes(0, 1))


def formula() -> dict[str, float]:
  """The op against softmax(Q K^T / sqrt(d)) V in float64, and its sums."""
  q, k, v = draw(N), draw(M, seed=1), draw(M, seed=2)
  wanted = oracles.softmax_attention(q[0], k[0], v[0])
  return dict(
    error=largest(ops.attention(q, k, v)[0], wanted),
    sums=float(np.abs(weights(q, k).sum(-1) - 1).max()),
  )


def kinds() -> dict[str, dict]:
  """Weights that are not zero: their shape, and how many of a head."""
  x, memory = draw(N), draw(M, seed=1)
  found = {}
  for name, key, mask in (
    ('self', x, None),
    ('cross', memory, None),
    ('causal', x, masks.Causal()),
  ):
    p = weights(x, key, mask)
    found[name] = dict(
      shape=list(p.shape),
      used=int((p[0] > 0).sum()),
      above=int((np.triu(p[0], 1) > 0).sum()),
    )
  heads = weights(x, x)
  found['heads'] = dict(apart=float(np.abs(heads[1:] - heads[0]).max()))
  return found


def cross() -> dict[str, int]:
  """Rows that change with one token of the target, and of the source."""
  target, source = draw(N), draw(M, seed=1)

  def rows(target, source):
    return ops.attention(target, source, source)[0]

  def changed(*moved):
    far = jnp.abs(rows(*moved) - rows(target, source)).max((1, 2))
    return int((far > 1e-4).sum())

  return dict(
    target=changed(target.at[:, 0].add(1), source),
    source=changed(target, source.at[:, 0].add(1)),
  )


def additive(q, k, *weights) -> np.ndarray:
  """Returns w . tanh(W_q q + W_k k) pair by pair, in float64."""
  q, k, to_q, to_k, w = (np.asarray(x, np.float64) for x in (q, k, *weights))
  out = np.zeros((q.shape[2], q.shape[1], k.shape[1]))
  for n, t, s in np.ndindex(*out.shape):
    hidden = np.tanh(q[0, t, n] @ to_q[n] + k[0, s, n] @ to_k[n])
    out[n, t, s] = w[n] @ hidden
  return out


def scores() -> dict[str, dict]:
  """Scores of each function: against loops, parameters and operations."""
  rng = np.random.default_rng(3)
  q, k = draw(N), draw(M, seed=1)
  mlp = [
    jnp.asarray(rng.standard_normal(shape), jnp.float32)
    for shape in ((HEADS, H, H), (HEADS, H, H), (HEADS, H))
  ]
  dots = np.einsum('tnh,snh->nts', *(np.asarray(x[0], float) for x in (q, k)))
  found = {}
  for name, parts, wanted in (
    ('dot', (), dots),
    ('scaled_dot', (), dots / H**0.5),
    ('additive', mlp, additive(q, k, *mlp)),
  ):
    score = getattr(score_functions, name)
    counted = cost.count(score, q, k, *parts)
    found[name] = dict(
      error=largest(score(q, k, *parts)[0], wanted),
      parameters=sum(x.size for x in parts),
      operations=counted.operations,
      largest_array=counted.largest_array,
    )
  return found


def choices() -> dict[str, dict]:
  """Weights of soft and of hard attention, and the output of either."""
  logits = 3 * score_functions.scaled_dot(draw(N), draw(M, seed=1))
  values = np.asarray(draw(M, seed=2)[0]).swapaxes(0, 1)  # [heads, M, H]
  found = {}
  for name in ('softmax', 'hard'):
    p = np.asarray(getattr(normalizers, name)(logits)[0])
    out = np.einsum('nts,nsh->nth', p, values)
    far = np.abs(out[:, :, None] - values[:, None]).max(-1).min(-1)
    found[name] = dict(
      used=int((p > 0).sum(-1).max()),
      least=int((p > 0).sum(-1).min()),
      sums=float(np.abs(p.sum(-1) - 1).max()),
      from_a_value=float(far.max()),
    )
  return found


def lookup() -> float:
  """The error of looking up every one of as many keys as channels."""
  keys = 30 * jnp.eye(H)[None, :, None]
  values = draw(H, 1)
  return largest(ops.attention(keys, keys, values), values)


def measure() -> dict:
  """R44: all of these."""
  found = scores()
  return dict(
    **formula(),
    kinds=kinds(),
    cross=cross(),
    scores=found,
    score=max(row['error'] for row in found.values()),
    choices=choices(),
    lookup=lookup(),
  )


ROUNDING = 1e-5
TERMS = 'float32 rounds sums of 40 terms to 40 x 6e-8 at the worst'


def shown_kind(name: str):
  """The shape of a head's weights, and those that are not zero."""

  def measured(values):
    row = values['kinds'][name]
    shape = ' x '.join(map(str, row['shape'][1:]))
    return f'{shape}, {row["used"]} in use'

  return measured


def kind(
  name: str, says: str, printed: str, size: int, used: int, rule: str
) -> Statement:
  """Whether weights have the printed shape, and as many that are not zero."""

  def judge(values):
    row = values['kinds'][name]
    right = row['shape'][1:] == [N, size] and row['used'] == used
    return HOLDS if right else FAILS

  return Statement(
    says=says,
    source='S002 Attention Types',
    printed=printed,
    measured=shown_kind(name),
    judge=judge,
    rule=rule,
  )


def triangle(values) -> str:
  """Nothing above the diagonal, all below."""
  row = values['kinds']['causal']
  full = row['used'] == N * (N + 1) // 2
  return HOLDS if full and not row['above'] else FAILS


def shown_heads(values) -> str:
  """How many matrices, and how far apart."""
  count = values['kinds']['self']['shape'][0]
  apart = values['kinds']['heads']['apart']
  return f'{count} matrices, apart by up to {apart:.2f}'


def heads(values) -> str:
  """A matrix for each head, and not the same."""
  count = values['kinds']['self']['shape'][0]
  apart = values['kinds']['heads']['apart'] > 0.01
  return HOLDS if count == HEADS and apart else FAILS


def shown_cross(values) -> str:
  """Rows that change."""
  row = values['cross']
  return (
    f'a token of the target changes {row["target"]} of {N} rows, one of the '
    f'source {row["source"]}'
  )


def sources(values) -> str:
  """A query is of its own token alone, keys and values of every row."""
  return HOLDS if values['cross'] == dict(target=1, source=N) else FAILS


def simpler(values) -> str:
  """Fewer parameters, operations and numbers at once."""
  dot, mlp = (values['scores'][name] for name in ('dot', 'additive'))
  keys = ('parameters', 'operations', 'largest_array')
  return HOLDS if all(dot[key] < mlp[key] for key in keys) else FAILS


def shown_simpler(values) -> str:
  """Both, side by side."""
  return '; '.join(
    f'{name}: {row["parameters"]:,} parameters, {row["operations"]:,.0f} '
    f'operations, {row["largest_array"]:,} numbers at once'
    for name, row in values['scores'].items()
    if name != 'scaled_dot'
  )


def soft(values) -> str:
  """Every value counts, with weights that sum to one."""
  row = values['choices']['softmax']
  average = row['sums'] < ROUNDING and row['least'] == M
  return HOLDS if average else FAILS


def hard(values) -> str:
  """One value is the output."""
  row = values['choices']['hard']
  one = row['used'] == 1 and row['from_a_value'] < ROUNDING
  return HOLDS if one else FAILS


def shown_choice(name: str):
  """What a choice takes of the values."""

  def measured(values):
    row = values['choices'][name]
    return (
      f'{row["least"]} to {row["used"]} of {M} values, off the nearest by up '
      f'to {row["from_a_value"]:.2g}'
    )

  return measured


R44 = Claim(
  title='Steps, kinds, scores and choices of attention',
  tier='a',
  measure=measure,
  seeds=(0, 1, 2, 3),
  statements=(
    within(
      'Attention is softmax(Q K^T / sqrt(d_k)) V',
      'S002 The Universal Formula; S003 The Attention Formula',
      'softmax(QK^T / √d_k) V',
      'error',
      0,
      ROUNDING,
      reason=f'against loops in float64; {TERMS}',
    ),
    within(
      'The softmax makes probabilities of the scores',
      'S002 Step-by-Step; S003 Apply Softmax',
      'probabilities; weights sum to 1',
      'sums',
      0,
      ROUNDING,
      unit='from 1',
      reason=TERMS,
    ),
    kind(
      'self',
      'Self-attention has a matrix of N x N',
      'N × N',
      N,
      N * N,
      f'weights of {N} x {N}, none of them zero',
    ),
    kind(
      'cross',
      'Cross-attention has a matrix of N x M',
      'N × M',
      M,
      N * M,
      f'weights of {N} x {M}, none of them zero',
    ),
    Statement(
      says='The queries of cross-attention are of the target, keys and values '
      'of the source',
      source='S002 Attention Types',
      printed='Target, Source',
      measured=shown_cross,
      judge=sources,
      rule='one row changes with a token of the target, every row with one of '
      'the source',
    ),
    Statement(
      says='Causal attention has a triangular matrix',
      source='S002 Attention Types',
      printed='N × N (triangular)',
      measured=shown_kind('causal'),
      judge=triangle,
      rule='no weight above the diagonal, none of zero below',
    ),
    Statement(
      says='Attention of h heads has h matrices of N x N',
      source='S002 Attention Types',
      printed='h × (N × N)',
      measured=shown_heads,
      judge=heads,
      rule='as many as heads, apart by more than 0.01',
    ),
    within(
      'Additive, dot and scaled scores are those of their definitions',
      f'{OURS}, on S002 Score Functions',
      '',
      'score',
      0,
      ROUNDING,
      reason=f'against loops in float64; {TERMS}',
    ),
    Statement(
      says='The dot product is simpler than the additive score',
      source='S002 Evolution Timeline',
      printed='Simpler dot-product',
      measured=shown_simpler,
      judge=simpler,
      rule='fewer parameters, operations and numbers at once, as many hidden '
      'channels as those of a head',
    ),
    Statement(
      says='Soft attention is a weighted average of all values',
      source='S002 Soft vs Hard Attention',
      printed='Weighted average',
      measured=shown_choice('softmax'),
      judge=soft,
      rule=f'no weight is zero, and they sum to 1 to {ROUNDING:g}',
    ),
    Statement(
      says='Hard attention selects one value',
      source='S002 Soft vs Hard Attention',
      printed='discrete selection',
      measured=shown_choice('hard'),
      judge=hard,
      rule=f'one weight, and the output is a value to {ROUNDING:g}',
    ),
    within(
      'Attention is a soft lookup in a database',
      'S002 The Core Intuition',
      'soft database lookup',
      'lookup',
      0,
      ROUNDING,
      reason='keys far apart find their own values, to rounding',
    ),
  ),
)

ATTENTION_GUIDE = {'R44': R44}
