"""Positive random features of the softmax kernel: equations, and variance."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.recurrent.feature_maps import (
  orthogonal_projection,
  positive_random,
)
from experiments.survey import errata_other
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  UNDEFINED,
  Claim,
  holds,
  statement,
  within,
)


def random_features() -> dict:
  """R22: errors of equations, and of estimates of exp(x . y) by seed."""
  return equations_of_features() | estimates()


def equations_of_features() -> dict:
  """Errors of eq. 34, and of the op without and with w and -w (eq. 35)."""
  printed, _, ours = errata_other.random_features()
  both = errata_other.random_features(hyperbolic=True)[-1]
  return {'eq. 34': printed, 'ours': ours, 'eq. 35': both}


def estimates(kinds=('orthogonal', 'independent'), seeds=20) -> dict:
  """Root mean squared errors by number of features."""
  found, width = {}, 16
  rng = np.random.default_rng(0)
  a, b = jnp.asarray(rng.standard_normal((2, 64, width)) * 0.4, jnp.float32)
  a, b = (z / width**0.25 for z in (a, b))
  exact = np.exp(np.asarray(a @ b.T))
  for kind in kinds:
    for features in (16, 64, 256, 1024):
      errors = []
      for seed in range(seeds):
        key = jax.random.key(seed)
        if kind == 'orthogonal':
          projection = orthogonal_projection(key, features, width)
        else:
          projection = jax.random.normal(key, (features, width))
        made = [np.asarray(positive_random(z, projection)) for z in (a, b)]
        errors.append(np.mean((made[0] @ made[1].T - exact) ** 2))
      found[f'{kind} {features}'] = float(np.sqrt(np.mean(errors)))
  return found


@statement(
  'Eq. 34 estimates exp(x . y)',
  'FL p. 25, eq. 34',
  'exp(w . x |x|^2 / 2)',
  rule='expectation over w, by quadrature in float64, within 1 percent of the '
  'kernel; that of our op to 1e-12',
)
def eq_34_is_the_kernel(v):
  printed, ours = v['eq. 34'], v['ours']
  text = (
    f'error {printed:.2g} as printed, {ours:.1g} of our op with '
    'w . x - |x|^2 / 2'
  )
  if printed < 0.01:
    return HOLDS, text
  return FAILS if ours < 1e-12 else UNDEFINED, text


@statement(
  'Orthogonal features reduce the variance',
  'FL p. 25',
  rule='smaller error at 64 features',
)
def orthogonal_features_err_less(v):
  plain, orthogonal = v['independent 64'], v['orthogonal 64']
  text = f'error {plain:.4f} -> {orthogonal:.4f} at 64'
  return holds(orthogonal < plain), text


@statement(
  'More features estimate better',
  'FL p. 25',
  rule='error at 1024 features below 0.3 of that at 16',
)
def more_features_err_less(v):
  few, many = v['independent 16'], v['independent 1024']
  return holds(many < 0.3 * few), f'{few:.4f} at 16, {many:.4f} at 1024'


R22 = Claim(
  title='Positive random features estimate the softmax kernel',
  tier='b',
  measure=random_features,
  seeds=range(20),
  statements=(
    eq_34_is_the_kernel,
    within(
      'Eq. 35 estimates exp(x . y)',
      'FL p. 25, eq. 35',
      'exp(x . y)',
      'eq. 35',
      0,
      1e-12,
      unit='error of our op with w and -w',
      reason='rounding of float64',
    ),
    orthogonal_features_err_less,
    more_features_err_less,
  ),
)

RANDOM_FEATURES = {'R22': R22}
