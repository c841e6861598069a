"""Sparse weights, learned masks and spans, sampled keys, cheap scores."""

from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import attention
from efficient_attn.ops.selection.tokens import select_magicpig
from experiments import page
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  NOT_HERE,
  RESTATED,
  Claim,
  Statement,
)
from experiments.survey.claims import learned_sparsity as learned
from experiments.survey.claims import recall
from experiments.survey.seeds import SEEDS, spread
from experiments.survey.sources import OURS


def sampled_keys(draws: int = 3000) -> dict:
  """Means over draws of MagicPig, and how many standard errors they are off."""
  rng = np.random.default_rng(1)
  q = 1.5 * rng.standard_normal((1, 1, 1, 8))
  k, v = rng.standard_normal((1, 64, 1, 8)), rng.standard_normal((1, 64, 1, 4))
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v + 1))

  @jax.jit
  @jax.vmap
  def draw(seed):
    mask, bias = select_magicpig(
      q, k, num_bits=4, num_tables=8, sinks=0, window=1, seed=seed
    )
    out, lse = attention(q, k, v, mask=mask, bias=bias, return_lse=True)
    return out[0, 0, 0], jnp.exp(lse[0, 0, 0])

  outs, sums = (np.asarray(x, float) for x in draw(jnp.arange(draws)))
  out, lse = attention(q, k, v, return_lse=True)
  out, total = np.asarray(out[0, 0, 0]), float(jnp.exp(lse[0, 0, 0]))

  def off(x, wanted):
    error = x.std(0, ddof=1) / np.sqrt(draws)
    return float(np.abs((x.mean(0) - wanted) / error).max())

  bias = np.linalg.norm(outs.mean(0) - out) / np.linalg.norm(out)
  return dict(
    output=off(outs, out),
    bias=float(bias),
    denominator=off(sums, total),
    numerator=off(sums[:, None] * outs, total * out),
  )


def selectors() -> dict:
  """R39."""
  found = {}
  for kind in recall.KINDS:
    for seed in SEEDS[:3]:
      for name, figures in recall.figures(kind, seed).items():
        rows = found.setdefault(kind, {}).setdefault(name, [[], []])
        for row, figure in zip(rows, figures, strict=True):
          row.append(figure)
  variance = np.asarray(recall.scales('falling spectrum'), float) ** 2
  return dict(
    backend=jax.default_backend(),
    entmax=learned.sparse_weights(),
    slower=learned.slower(),
    dam=learned.learned_mask(),
    spans=learned.learned_spans(),
    magicpig=sampled_keys(),
    recall=found,
    variance=float(variance[:80].sum() / variance.sum()),
  )


def _mass(values, kind, name) -> float:
  return fmean(values['recall'][kind][name][1])


def _finds(values, name, kinds) -> str:
  """Whether what is found holds what the best keys do."""
  enough = [_mass(values, kind, name) > 0.95 for kind in kinds]
  return HOLDS if all(enough) else RESTATED if any(enough) else FAILS


def _learned_bits(values) -> str:
  kind = recall.KINDS[1]
  found = _finds(values, recall.LEARNED, [kind])
  random = _mass(values, kind, 'random bits 32')
  better = _mass(values, kind, recall.LEARNED) > 1.2 * random
  return RESTATED if found == FAILS and better else found


def _both(values, name) -> str:
  return '; '.join(
    f'{kind}: recall {fmean(rows[name][0]):.2f}, mass '
    f'{fmean(rows[name][1]):.3f} of that of the best'
    for kind, rows in values['recall'].items()
    if name in rows
  )


def _parts(values) -> list:
  parts = [
    page.curves(
      {
        name: (xs, [fmean(rows[f'{name} {x}'][0]) for x in xs])
        for name, xs in (
          ('SparQ', recall.RANKS),
          ('Loki', recall.RANKS),
          ('random bits', recall.BITS),
          ('learned bits', (32,)),
        )
        if f'{name} {xs[0]}' in rows
      },
      'channels, axes or bits',
      f'recall of the {recall.TOP} largest weights',
      f'{recall.S} keys of {recall.H} channels: {kind}',
    )
    for kind, rows in values['recall'].items()
  ]
  rows = [
    [kind, name, *map(spread, figures)]
    for kind, rows in values['recall'].items()
    for name, figures in rows.items()
  ]
  head = ['keys', 'scores by', 'recall', 'mass over the best mass']
  zeros = [['zeros of 20', *values['entmax']['zeros']]]
  head_of_zeros = ['alpha', *map(str, learned.ALPHAS)]
  note = (
    f'Entmax takes {values["slower"]:.2f} of the time of softmax in dense '
    f'attention of 512 tokens with gradients on this {values["backend"]}.'
  )
  return [
    *parts,
    page.Table(head, rows),
    page.Table(head_of_zeros, zeros),
    page.Text(note, note=True),
  ]


R39 = Claim(
  title='Sparse weights, learned masks, sampled keys and cheap scores',
  tier='b',
  measure=selectors,
  seeds=SEEDS[:3],
  parts=_parts,
  statements=(
    Statement(
      says='alpha-entmax is softmax at 1, and has zeros above',
      source='FL p. 21, eq. 16-19',
      measured=lambda v: (
        'zeros of 20: '
        + ', '.join(
          f'{zeros:.1f} at {alpha}'
          for alpha, zeros in zip(
            learned.ALPHAS, v['entmax']['zeros'], strict=True
          )
        )
      ),
      judge=lambda v: (
        HOLDS
        if v['entmax']['softmax'] < 1e-12
        and v['entmax']['zeros'][0] == 0
        and v['entmax']['zeros'][3] > 5
        else FAILS
      ),
      rule='equal to softmax at 1 to 1e-12, and more than 5 zeros at 1.5',
    ),
    Statement(
      says='It is the largest of p . z and an entropy of p',
      source='FL p. 21, eq. 17-18',
      measured=lambda v: f'largest gain of any move: {v["entmax"]["gain"]:.1e}',
      judge=lambda v: HOLDS if v['entmax']['gain'] <= 1e-12 else FAILS,
      rule='no point of the simplex is better, on 50 lines from each of 200 '
      'results, three steps each',
    ),
    Statement(
      says='Adaptively sparse attention is 25 percent slower',
      source='FL p. 21',
      printed='25%',
      measured=lambda v: f'{v["slower"]:.2f} of the time of softmax',
      judge=lambda v: (
        NOT_HERE
        if v['backend'] == 'cpu'
        else HOLDS
        if v['slower'] < 1.35
        else FAILS
      ),
      rule='less than 1.35 of the time, dense attention with gradients, on an '
      'accelerator',
    ),
    Statement(
      says='A mask that diagonals share has O(n) parameters',
      source='FL p. 21, eq. 15',
      printed='O(n)',
      measured=lambda v: f'n^{v["dam"]["growth"]:.2f}',
      judge=lambda v: HOLDS if v['dam']['growth'] < 1.1 else FAILS,
      rule='exponent below 1.1',
    ),
    Statement(
      says='Its first and last token see all, and all see them',
      source='FL p. 21',
      measured=lambda v: (
        f'{v["dam"]["forced"]} pairs where no other is likely, of '
        f'{v["dam"]["expected"]}'
      ),
      judge=lambda v: (
        HOLDS if set(v['dam']['forced']) == {v['dam']['expected']} else FAILS
      ),
      rule='4 n - 4 pairs',
    ),
    Statement(
      says='Its noise draws a pair with the probability sigmoid(alpha)',
      source='FL p. 21, eq. 15',
      measured=lambda v: (
        'standard errors from it: '
        + ', '.join(f'{gap:.1f}' for gap in v['dam']['gaps'])
      ),
      judge=lambda v: HOLDS if max(map(abs, v['dam']['gaps'])) < 4 else FAILS,
      rule='within 4 standard errors at -2, 0 and 1',
    ),
    Statement(
      says='A head reads no farther than its learned span',
      source='FL section 3, conditional computing',
      measured=lambda v: (
        f'{v["spans"]["keys"]} keys; a span of all tokens differs from '
        f'attention by {v["spans"]["whole"]:.0e}'
      ),
      judge=lambda v: (
        HOLDS
        if v['spans']['keys'] == v['spans']['expected']
        and v['spans']['whole'] < 1e-5
        else FAILS
      ),
      rule='span and ramp, and equal to 1e-5 where the span is the length',
    ),
    Statement(
      says='Attention to sampled keys is unbiased',
      source='AS p. 29',
      printed='unbiased',
      measured=lambda v: (
        'the output is off by {output:.1f} standard errors, {bias:.1%}'.format(
          **v['magicpig']
        )
      ),
      judge=lambda v: HOLDS if v['magicpig']['output'] < 4 else FAILS,
      rule='mean of 3000 draws within 4 standard errors: a ratio of unbiased '
      'sums is not unbiased',
    ),
    Statement(
      says='Its numerator and its denominator are unbiased',
      source=f'{OURS}, restating AS p. 29',
      measured=lambda v: (
        '{numerator:.1f} and {denominator:.1f} standard errors'.format(
          **v['magicpig']
        )
      ),
      judge=lambda v: (
        HOLDS
        if max(v['magicpig'][x] for x in ('numerator', 'denominator')) < 4
        else FAILS
      ),
      rule='within 4 standard errors',
    ),
    Statement(
      says='64 of 128 channels of a query find its keys (SparQ)',
      source='AS p. 26',
      printed='usually set to 64',
      measured=lambda v: _both(v, 'SparQ 64'),
      judge=lambda v: _finds(v, 'SparQ 64', recall.KINDS),
      rule='top 12.5% of the keys: 0.95 of the mass of the exact choice, for '
      'independent channels and for a falling spectrum',
    ),
    Statement(
      says='80 of 128 axes find the keys, where they hold 90% (Loki)',
      source='AS p. 26-27',
      printed='around 80 of 128, 90%',
      measured=lambda v: (
        f'{_both(v, "Loki 80")}; 80 axes of the latter hold '
        f'{v["variance"]:.0%} of the variance'
      ),
      judge=lambda v: _finds(v, 'Loki 80', recall.KINDS[1:]),
      rule='0.95 of the mass of the exact choice, for a falling spectrum',
    ),
    Statement(
      says='32 bits for each token find the keys (HashAttention)',
      source='AS p. 27',
      printed='32 bits',
      measured=lambda v: (
        f'learned: {_both(v, recall.LEARNED)}; random: '
        f'{_both(v, "random bits 32")}'
      ),
      judge=_learned_bits,
      rule='0.95 of the mass of the exact choice, for a falling spectrum; '
      'restated if learned bits hold a fifth more than random ones',
    ),
  ),
)

SELECTORS = {'R39': R39}
