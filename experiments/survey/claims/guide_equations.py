"""What a guide to Transformers says of caches, and of recurrences instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import ops
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.models import cost
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  Claim,
  Statement,
  elsewhere,
  within,
)
from experiments.survey.claims.transformer_guide import (
  HEADS,
  LENGTHS,
  ROUNDING,
  TERMS,
  D,
  H,
  N,
  normal,
)
from experiments.survey.models import decode_step, forward_flops, mixer


def equations() -> dict[str, float]:
  """Errors of the ops against the printed recurrences in float64."""
  q, k, v, gate = normal(4, 1, N, 2, H)
  k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
  beta, decay = jax.nn.sigmoid(gate[..., 0]), jax.nn.log_sigmoid(gate)
  one = [np.asarray(x[0], np.float64) for x in (q, k, v)]
  delta = oracles.recurrence(*one, beta=np.asarray(beta[0], np.float64))
  gates = np.exp(np.asarray(decay[0], np.float64))
  gla = oracles.recurrence(*one, decay=gates)
  both = ops.linear_attention(q, k, v, scale=1, bidirectional=True)[0]
  scores = np.einsum('tnh,snh->nts', one[0], one[1])
  return dict(
    delta=largest(ops.delta_rule(q, k, v, beta, scale=1)[0][0], delta),
    gla=largest(
      ops.linear_attention(q, k, v, log_decay=decay, scale=1)[0][0], gla
    ),
    reordered=largest(both[0], np.einsum('nts,snv->tnv', scores, one[2])),
    ssm=continuous(),
  )


def continuous(steps=2000, states=4) -> float:
  """The op against h' = A h + B x, y = C h in small steps of Euler.

  The input is constant in each interval of 0.1, as the op has it.
  """
  rng = np.random.default_rng(1)
  a = -rng.uniform(0.5, 2, states)
  b, c = rng.standard_normal((2, states))
  x, h, wanted = rng.standard_normal(N), np.zeros(states), []
  for token in x:
    for _ in range(steps):
      h = h + 0.1 / steps * (a * h + b * token)
    wanted.append(c @ h)
  rows = [jnp.asarray(np.tile(y, (1, N, 1)), jnp.float32) for y in (b, c)]
  out, _ = ops.selective_scan(
    jnp.asarray(x, jnp.float32)[None, :, None, None],
    jnp.full((1, N, 1, 1), 0.1),
    jnp.asarray(a, jnp.float32)[None, None],
    *rows,
    discretization='zoh',
  )
  return largest(out[0, :, 0, 0], wanted)


def cached(length=1024) -> dict[str, float]:
  """Decoding with a cache: its outputs, and its FLOPs over those of a pass."""
  module = build_mixer(
    'attention', d_model=D, num_heads=HEADS, rngs=nnx.Rngs(0)
  )
  x = normal(1, N, D)
  cache, rows = module.init_cache(1, N, jnp.float32), []
  for t in range(N):
    y, cache = module(x[:, t : t + 1], cache=cache)
    rows.append(y[0, 0])
  shapes = mixer('attention', D, HEADS)
  whole = jax.ShapeDtypeStruct((1, length, D), jnp.float32)
  return dict(
    cache_error=largest(jnp.stack(rows), module(x)[0][0]),
    cache_flops=decode_step(shapes, D, length).flops
    / forward_flops(shapes, whole),
  )


def orders() -> dict[str, float]:
  """Exponents of FLOPs: by scores first, and by keys and values first."""

  def of(op, n):
    x = (jax.ShapeDtypeStruct((1, n, 1, H), jnp.float32),) * 3
    return cost.flops(op, *x)

  scores = functools.partial(ops.attention, implementation='reference')
  states = functools.partial(ops.linear_attention, bidirectional=True)
  return dict(
    scores_first=slope(LENGTHS, [of(scores, n) for n in LENGTHS]),
    states_first=slope(LENGTHS, [of(states, n) for n in LENGTHS]),
  )


def measure() -> dict:
  """R46: all of these."""
  return equations() | cached() | orders()


def reordered(values) -> str:
  """The same numbers at the cost of one order, and of the other."""
  same = values['reordered'] < ROUNDING
  powers = values['scores_first'] - 2, values['states_first'] - 1
  return HOLDS if same and max(map(abs, powers)) < 0.05 else FAILS


def shown_orders(values) -> str:
  """Exponents and error."""
  return (
    f'FLOPs n^{values["scores_first"]:.2f} and n^{values["states_first"]:.2f}, '
    f'error {values["reordered"]:.1e}'
  )


def from_cache(values) -> str:
  """The same outputs for less."""
  cheap = values['cache_flops'] < 0.01
  return HOLDS if values['cache_error'] < ROUNDING and cheap else FAILS


def shown_cache(values) -> str:
  """Error and share."""
  return (
    f'error {values["cache_error"]:.1e}, {values["cache_flops"]:.2%} of the '
    'FLOPs of a pass over 1,024 tokens'
  )


def equation(says: str, place: str, printed: str, key: str) -> Statement:
  """Whether an op computes a printed equation."""
  return within(
    says,
    f'S003 {place}',
    printed,
    key,
    0,
    ROUNDING,
    reason=f'against the equation in float64; {TERMS}',
  )


R46 = Claim(
  title='Caches and recurrences in the place of attention',
  tier='b',
  measure=measure,
  seeds=(0, 1),
  statements=(
    Statement(
      says='Q (K^T V) in place of (Q K^T) V changes O(n^2) to O(n)',
      source='S003 Linear / Kernel Attention',
      printed='O(n²) to O(n)',
      measured=shown_orders,
      judge=reordered,
      rule='exponents of FLOPs within 0.05; without softmax and mask the same '
      f'numbers to {ROUNDING:g}',
    ),
    equation(
      'The delta rule adds k beta (v - S^T k)^T to the state',
      'Delta Rule & DeltaNet',
      'S_t = S_{t-1} + k_t β_t (v_t - S_{t-1}^T k_t)^T',
      'delta',
    ),
    equation(
      'Gated linear attention multiplies the state by a gate and adds k v^T',
      'Gated Linear Attention (GLA)',
      'S_t = G_t ⊙ S_{t-1} + k_t ⊗ v_t',
      'gla',
    ),
    within(
      "A state space model is h' = A h + B x, y = C h",
      'S003 State Space Models (Mamba)',
      "h'(t) = Ah(t) + Bx(t), y(t) = Ch(t)",
      'ssm',
      0,
      1e-4,
      reason='against 2,000 steps of Euler for each token, which are off by '
      '0.1 / 2000 of a rate of 2 at most',
    ),
    Statement(
      says='A cache of keys and values avoids computing them again',
      source='S003 KV Cache',
      printed='Avoids recomputation',
      measured=shown_cache,
      judge=from_cache,
      rule=f'outputs of the whole pass to {ROUNDING:g}, and a hundredth of its '
      'FLOPs or less for a token',
    ),
    *(
      elsewhere(
        says,
        'S003 Hybrid Architectures (Kimi Linear)',
        printed,
        'both models of the paper, trained; `python launch/ablate.py '
        '--config=configs/ablations/lm_quality.py` trains smaller ones on GPUs',
      )
      for says, printed in (
        ('Kimi Linear gains 1.8 on MMLU-Pro over full attention', '+1.8'),
        ('Kimi Linear gains 3.2 on RULER at 128K tokens', '+3.2'),
      )
    ),
    elsewhere(
      'Kimi Linear is 6.3 times as fast as full attention at 1M tokens',
      'S003 Hybrid Architectures (Kimi Linear)',
      '6.3x',
      'the kernels and the machine of its authors; `python launch/bench.py '
      '--suite=linear` times the recurrences here on an accelerator',
    ),
  ),
)

GUIDE_EQUATIONS = {'R46': R46}
