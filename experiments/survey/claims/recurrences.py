"""Linear attention: its forms, its state, what it remembers and estimates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.layers.mixers import MIXERS
from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.ops.recurrent.feature_maps import (
  orthogonal_projection,
  positive_random,
)
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from experiments import page
from experiments.exponent import slope
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  Claim,
  Statement,
  within,
)
from experiments.survey.models import cache_bytes, decode_step, mixer
from experiments.survey.sources import OURS

T, N, H = 64, 2, 16


def tokens(seed=0):
  """Queries, keys, values, write strengths and log decays of one sequence."""
  rng = np.random.default_rng(seed)
  q, k, v = rng.standard_normal((3, 1, T, N, H))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  beta = rng.uniform(size=(1, T, N))
  decay = np.log(rng.uniform(0.5, 1, (1, T, N, H)))
  return tuple(jnp.asarray(x, jnp.float32) for x in (q, k, v, beta, decay))


def forms_agree() -> dict:
  """R15: every form and chunk size against the recurrence."""
  q, k, v, beta, decay = tokens()
  calls = {
    'no gate': functools.partial(linear_attention, q, k, v),
    'constant gate': functools.partial(
      linear_attention, q, k, v, log_decay=decay[0, 0, :, 0]
    ),
    'scalar gate': functools.partial(
      linear_attention, q, k, v, log_decay=decay[..., 0]
    ),
    'channel gate': functools.partial(
      linear_attention, q, k, v, log_decay=decay
    ),
    'delta rule': functools.partial(delta_rule, q, k, v, beta),
    'gated delta rule': functools.partial(
      delta_rule, q, k, v, beta, log_decay=decay[..., 0]
    ),
    'channel-gated delta rule': functools.partial(
      delta_rule, q, k, v, beta, log_decay=decay
    ),
    'diagonal plus low rank': functools.partial(
      dplr, q, k, v, k, -k * beta[..., None], log_decay=decay
    ),
  }
  found = {}
  for name, call in calls.items():
    wanted, _ = call(form='recurrent')
    worst = 0.0
    for form in ('parallel', 'chunkwise'):
      for size in (1, 4, 16, T) if form == 'chunkwise' else (T,):
        try:
          ours, _ = call(form=form, chunk_size=size)
        except NotImplementedError:
          continue
        worst = max(worst, float(jnp.abs(ours - wanted).max()))
    found[name] = worst / float(jnp.abs(wanted).max())
  return found


R15 = Claim(
  title='Recurrent, parallel and chunkwise forms are one',
  tier='b',
  measure=forms_agree,
  seeds=(0,),
  statements=(
    Statement(
      says='All forms of linear attention give the same outputs',
      source=f'{OURS}, correcting AS sections 7.2, 7.3 and appendix A',
      measured=lambda v: f'{max(v.values()):.1e} over {len(v)} recurrences',
      judge=lambda v: HOLDS if max(v.values()) < 1e-5 else FAILS,
      rule='relative difference below 1e-5 in float32, chunks of 1 to N',
    ),
  ),
)


def decoding() -> dict:
  """R18: decode state and FLOPs of a token against the context."""
  lengths = [512, 2048, 8192, 16_384]
  rows = {
    'attention': 1,
    'linear': 0,
    'deltanet': 0,
    'mamba2': 0,
    'ttt_linear': 0,
    'log_linear': 0,
  }
  found = dict(lengths=lengths)
  for name in rows:
    if name not in MIXERS:
      continue
    module = mixer(name, 64, 4)
    found[f'{name} state'] = [cache_bytes(module, n) for n in lengths]
    found[f'{name} flops'] = [decode_step(module, 64, n).flops for n in lengths]
  return found


def _decode_plot(values) -> list:
  lengths = values['lengths']
  return [
    page.curves(
      {
        f'{key.removesuffix(" state")}: N^{slope(lengths, row):.2f}': (
          lengths,
          row,
        )
        for key, row in values.items()
        if key.endswith(' state')
      },
      'tokens in the context',
      'bytes of decode state',
      'Decode state of one layer, width 64',
      log='xy',
    )
  ]


def _constant(values, name) -> bool:
  return (
    len(set(values[f'{name} state'])) == 1 == len(set(values[f'{name} flops']))
  )


R18 = Claim(
  title='A token costs the same at any length of context',
  tier='b',
  measure=decoding,
  parts=_decode_plot,
  statements=(
    Statement(
      says='Linear attention decodes a token in constant time and memory',
      source='AS p. 12 and 32',
      printed='O(1)',
      measured=lambda v: ', '.join(
        name for name in ('linear', 'deltanet', 'mamba2') if _constant(v, name)
      ),
      judge=lambda v: (
        HOLDS
        if all(_constant(v, n) for n in ('linear', 'deltanet', 'mamba2'))
        else FAILS
      ),
      rule='the same bytes and FLOPs at every length',
    ),
    Statement(
      says='Softmax attention needs memory and time O(N) for a token',
      source='AS p. 8',
      printed='O(N)',
      measured=lambda v: (
        f'state N^{slope(v["lengths"], v["attention state"]):.2f}, '
        f'FLOPs N^{slope(v["lengths"], v["attention flops"]):.2f}'
      ),
      judge=lambda v: (
        HOLDS if slope(v['lengths'], v['attention state']) > 0.95 else FAILS
      ),
      rule='exponent of the state above 0.95',
    ),
  ),
)


def overflow() -> dict:
  """R19: the printed quadratic form and the framework's, by length."""
  found = {}
  for decay in (0.9, 0.95):
    first = None
    for length in (256, 512, 1024, 2048, 4096):
      rng = np.random.default_rng(0)
      q, k, v = rng.standard_normal((3, length, 4)).astype(np.float32)
      with np.errstate(all='ignore'):
        a = np.cumprod(np.full((length, 4), decay, np.float32), 0)
        printed = np.tril((q * a) @ (k / a).T) @ v
      if first is None and not np.isfinite(printed).all():
        first = length
    x = [jnp.asarray(x[None, :, None]) for x in (q, k, v)]
    gate = jnp.full((1, length, 1, 4), np.log(decay), jnp.float32)
    ours = [
      linear_attention(*x, log_decay=gate, form=form)[0]
      for form in ('recurrent', 'chunkwise')
    ]
    found[f'{decay} first'] = first or 0
    found[f'{decay} ours'] = float(jnp.abs(ours[0] - ours[1]).max())
  return found


R19 = Claim(
  title='Cumulative products overflow, sums of logarithms do not',
  tier='b',
  measure=overflow,
  seeds=(0,),
  statements=(
    Statement(
      says='The quadratic form with gates works at any length',
      source='AS p. 38, eq. 56',
      printed='exact',
      measured=lambda v: (
        f'not finite from N = {v["0.9 first"]} (0.9), {v["0.95 first"]} (0.95)'
      ),
      judge=lambda v: FAILS if v['0.9 first'] else HOLDS,
      rule='finite in float32 up to 4096 tokens at a decay of 0.9',
      provenance=DERIVED,
    ),
    within(
      'Chunks with sums of logarithms are right at 4096 tokens',
      f'{OURS}, correcting AS appendix A',
      '',
      '0.9 ours',
      0,
      1e-4,
    ),
  ),
)


def overwriting() -> dict:
  """R20: writing again to keys, and one pass over more keys than channels."""
  rng = np.random.default_rng(0)
  width, found = 64, {}
  keys = rng.standard_normal((16, width))
  keys /= np.linalg.norm(keys, axis=1, keepdims=True)
  values = rng.standard_normal((4, 16, width))
  k = np.tile(keys, (4, 1))
  v = values.reshape(-1, width)

  def read(call, k, v, queries):
    length, count = len(k), len(queries)
    q = np.concatenate([np.zeros_like(k), queries])
    k = np.concatenate([k, np.zeros((count, width))])
    v = np.concatenate([v, np.zeros((count, width))])
    x = [jnp.asarray(y[None, :, None], jnp.float32) for y in (q, k, v)]
    return np.asarray(call(*x)[0])[0, length:, 0]

  ops_by_name = {
    'additive': lambda q, k, v: linear_attention(q, k, v, scale=1),
    'delta': lambda q, k, v: delta_rule(
      q, k, v, jnp.ones(k.shape[:3]), scale=1
    ),
  }
  for name, call in ops_by_name.items():
    out = read(call, k, v, keys)
    found[f'{name} error'] = float(
      np.linalg.norm(out - values[-1]) / np.linalg.norm(values[-1])
    )
    for count in (32, 256):
      many = rng.standard_normal((count, width))
      many /= np.linalg.norm(many, axis=1, keepdims=True)
      wanted = rng.standard_normal((count, width))
      out = read(call, many, wanted, many)
      found[f'{name} recall {count}'] = float(
        (np.argmax(out @ wanted.T, 1) == np.arange(count)).mean()
      )
  return found


R20 = Claim(
  title='The delta rule overwrites instead of adding',
  tier='b',
  measure=overwriting,
  seeds=(0,),
  statements=(
    Statement(
      says='The delta rule removes what a key held before',
      source='AS p. 41; S003 Delta Rule & DeltaNet',
      printed='subtract old before adding new',
      measured=lambda v: (
        f'error after 4 writes to 16 keys: {v["additive error"]:.2f} added, '
        f'{v["delta error"]:.2f} delta rule'
      ),
      judge=lambda v: (
        HOLDS if v['delta error'] < 0.5 * v['additive error'] else FAILS
      ),
      rule='half the error of adding, or less',
    ),
    Statement(
      says='The delta rule solves collisions of more keys than channels',
      source='AS p. 41',
      printed='key collisions when length exceeds the key dimension',
      measured=lambda v: (
        f'256 keys in 64 channels, one pass: {v["additive recall 256"]:.0%} '
        f'recalled by adding, {v["delta recall 256"]:.0%} by the delta rule'
      ),
      judge=lambda v: (
        HOLDS if v['delta recall 256'] >= v['additive recall 256'] else FAILS
      ),
      rule='it recalls at least as many',
    ),
  ),
)


def random_features() -> dict:
  """R22: estimates of exp(x . y) by positive random features."""
  found = {}
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 6)) * 0.35
  w = rng.standard_normal((1_000_000, 6))
  found['exact'] = float(np.exp(x @ y))
  found['printed'] = float(
    np.mean(np.exp(w @ x * (x @ x) / 2) * np.exp(w @ y * (y @ y) / 2))
  )
  found['corrected'] = float(
    np.mean(np.exp(w @ x - x @ x / 2) * np.exp(w @ y - y @ y / 2))
  )
  width = 16
  a, b = jnp.asarray(rng.standard_normal((2, 64, width)) * 0.4, jnp.float32)
  a, b = (z / width**0.25 for z in (a, b))
  exact = np.exp(np.asarray(a @ b.T))
  for kind in ('orthogonal', 'independent'):
    for features in (16, 64, 256, 1024):
      errors = []
      for seed in range(20):
        key = jax.random.key(seed)
        if kind == 'orthogonal':
          projection = orthogonal_projection(key, features, width)
        else:
          projection = jax.random.normal(key, (features, width))
        made = [np.asarray(positive_random(z, projection)) for z in (a, b)]
        errors.append(np.mean((made[0] @ made[1].T - exact) ** 2))
      found[f'{kind} {features}'] = float(np.sqrt(np.mean(errors)))
  return found


R22 = Claim(
  title='Positive random features estimate the softmax kernel',
  tier='b',
  measure=random_features,
  seeds=range(20),
  statements=(
    Statement(
      says='Eq. 34 estimates exp(x . y)',
      source='FL p. 25, eq. 34',
      printed='equal',
      measured=lambda v: (
        f'{v["printed"]:.4f} as printed, {v["corrected"]:.4f} corrected, '
        f'{v["exact"]:.4f} exact'
      ),
      judge=lambda v: (
        HOLDS if abs(v['printed'] / v['exact'] - 1) < 0.01 else FAILS
      ),
      rule='within 1 percent of the exact kernel, a million samples',
      provenance=DERIVED,
    ),
    Statement(
      says='Eq. 35 estimates exp(x . y)',
      source='FL p. 25, eq. 35',
      printed='equal',
      measured=lambda v: f'{v["corrected"]:.4f} against {v["exact"]:.4f}',
      judge=lambda v: (
        HOLDS if abs(v['corrected'] / v['exact'] - 1) < 0.01 else FAILS
      ),
      rule='within 1 percent',
      provenance=DERIVED,
    ),
    Statement(
      says='Orthogonal features reduce the variance',
      source='FL p. 25',
      printed='',
      measured=lambda v: (
        f'error {v["independent 64"]:.4f} -> {v["orthogonal 64"]:.4f} at 64'
      ),
      judge=lambda v: (
        HOLDS if v['orthogonal 64'] < v['independent 64'] else FAILS
      ),
      rule='smaller error at 64 features',
    ),
    Statement(
      says='More features estimate better',
      source='FL p. 25',
      printed='',
      measured=lambda v: (
        f'{v["independent 16"]:.4f} at 16, {v["independent 1024"]:.4f} at 1024'
      ),
      judge=lambda v: (
        HOLDS if v['independent 1024'] < 0.3 * v['independent 16'] else FAILS
      ),
      rule='error at 1024 features below 0.3 of that at 16',
    ),
  ),
)

RECURRENCES = {'R15': R15, 'R18': R18, 'R19': R19, 'R20': R20, 'R22': R22}
