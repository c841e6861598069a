"""Scores that are divided by the root of the width, and scores that are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from efficient_attn import models, ops
from efficient_attn.config import LMConfig
from efficient_attn.data.tasks import TASKS
from efficient_attn.ops.softmax import score_functions
from efficient_attn.train.objectives.cross_entropy import cross_entropy
from experiments.exponent import slope
from experiments.survey.claim import (
  Claim,
  holds,
  statement,
  within,
)

WIDTHS = (64, 128, 256, 512, 1024, 2048)
SCALES = {'raw': 1.0, 'scaled': None}  # None is the default, 1 / sqrt(H)


def dots(count=2000) -> dict:
  """Products of normal queries and keys of each width, by our scores."""
  found = dict(widths=list(WIDTHS), deviations=[], scaled=[])
  for width in WIDTHS:
    rng = np.random.default_rng(0)
    pair = rng.standard_normal((2, 1, count, 1, width), np.float32)
    raw, scaled = (
      np.asarray(score(*map(jnp.asarray, pair)), np.float64)
      for score in (score_functions.dot, score_functions.scaled_dot)
    )
    found['deviations'].append(float(raw.std()))
    found['scaled'].append(float(scaled.std()))
    if width == 512:
      found['inside 45'] = float((np.abs(raw) < 45).mean())
      found['inside 3'] = float((np.abs(scaled) < 3).mean())
      found['45 scaled'] = 45 * float(scaled.std() / raw.std())
  found['slope'] = slope(WIDTHS, found['deviations'])
  found['scaled slope'] = slope(WIDTHS, found['scaled'])
  return found


def saturation(length=512, width=512) -> dict:
  """Weights and gradients of the op on normal queries and keys."""
  rng = np.random.default_rng(0)
  q, k, v, out = (
    jnp.asarray(rng.standard_normal((1, length, 1, n)), jnp.float32)
    for n in (width, width, 64, 64)
  )
  found = {}
  for name, scale in SCALES.items():

    def read(q, bias, v, scale=scale):
      return ops.attention(
        q, k, v, bias=bias, scale=scale, implementation='reference'
      )

    def loss(q, bias, read=read):
      return (read(q, bias, v) * out).sum()

    none = jnp.zeros((1, 1, length, length))
    p = read(q, none, jnp.eye(length)[None, :, None])
    gradient, of_logits = jax.grad(loss, (0, 1))(q, none)
    rows = {'queries': gradient, 'logits': of_logits}
    found[f'{name} top'] = float(p.max(-1).mean())
    found[f'{name} jacobian'] = float((p * (1 - p)).sum(-1).mean())
    for what, g in rows.items():
      sizes = jnp.linalg.norm(g.reshape(length, -1), axis=-1)
      found[f'{name} {what}'] = float(jnp.median(sizes))
      found[f'{name} {what} mean'] = float(sizes.mean())
  return found


def train(scale, steps=200, batch=16, seeds=3) -> list[float]:
  """Loss over the last 20 steps on recall of 4 pairs, by seed."""
  task = TASKS['mqar'](vocab_size=32, segments=((32, 4, 1),))
  rng = np.random.default_rng(0)
  examples = [task.draw(rng, True) for _ in range(steps * batch)]
  data = jax.tree.map(
    lambda *x: np.stack(x).reshape(steps, batch, -1), *examples
  )
  config = models.with_dtype(
    LMConfig(
      d_model=64,
      num_layers=2,
      num_heads=1,
      vocab_size=32,
      ffn='none',
      scan_layers=False,
    )
  )

  def build(key):
    model = models.build(config, rngs=nnx.Rngs(key))
    for block in model.stack.blocks():
      block.mixer.scale = scale
    return nnx.split(model)

  graphdef, _ = build(jax.random.key(0))
  adam = optax.adam(3e-3)

  def loss(params, example):
    logits, _ = nnx.merge(graphdef, params)(example.tokens)
    _, nll = cross_entropy(logits, example.labels)
    return jnp.sum(nll * example.weights) / jnp.sum(example.weights)

  def step(carry, example):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params, example)
    updates, state = adam.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  @jax.vmap
  def run(key):
    params = build(key)[1]
    return jax.lax.scan(step, (params, adam.init(params)), data)[1]

  losses = jax.jit(run)(jax.random.split(jax.random.key(1), seeds))
  return losses[:, -20:].mean(1).tolist()


def scaled_logits() -> dict:
  """R31: logits, weights, gradients and training with and without scale."""
  losses = {f'{name} loss': train(scale) for name, scale in SCALES.items()}
  return dots() | saturation() | losses | dict(chance=float(np.log(16)))


@statement(
  'Scaling takes [-45, 45] to [-3, 3]',
  'S002 Why √d_k?',
  '[-45, +45], [-3, +3]',
  rule='45 over the measured deviation is 3 to 10 percent',
)
def scaling_takes_45_to_3(v):
  scaled = v['45 scaled']
  text = f'45 -> {scaled:.2f}: two deviations, and 3 are three'
  return holds(abs(scaled / 3 - 1) < 0.1), text


@statement(
  'Without the scale the softmax is nearly one-hot',
  'S002 Why √d_k?',
  'one-hot',
  rule='mean over queries above 0.8 raw, and below it scaled',
)
def raw_scores_are_one_hot(v):
  raw, scaled = v['raw top'], v['scaled top']
  text = f'largest of 512 weights {raw:.3f}, scaled {scaled:.3f}'
  return holds(raw > 0.8 > scaled), text


@statement(
  'Without the scale gradients vanish',
  'S002 Why √d_k?',
  'vanish',
  rule='at the median query a fifth or less, at the logits and at the query; '
  'restated if only at the logits',
)
def raw_gradients_vanish(v):
  text = (
    'sum p (1 - p) {raw jacobian:.3f} raw, {scaled jacobian:.3f} scaled; '
    'gradient of the median row of logits {raw logits:.3f}, '
    '{scaled logits:.3f}, but on average {raw logits mean:.2f}, '
    '{scaled logits mean:.2f}, and of queries {raw queries mean:.1f}, '
    '{scaled queries mean:.2f}'
  ).format_map(v)
  logits = v['raw logits'] <= 0.2 * v['scaled logits']
  queries = v['raw queries'] < 0.2 * v['scaled queries']
  return holds(logits and queries, restated=logits), text


@statement(
  'Without the scale training fails',
  'S002 Why √d_k?',
  'fails',
  rule='no better than a guess by 2 percent; restated if every seed is worse '
  'than every scaled one (recall, 2 layers, H = 64, 3 seeds)',
)
def raw_scores_do_not_train(v):
  raw, scaled, chance = v['raw loss'], v['scaled loss'], v['chance']
  text = (
    f'loss after 200 steps: raw {min(raw):.2f}-{max(raw):.2f}, scaled '
    f'{min(scaled):.2f}-{max(scaled):.2f}, {chance:.2f} by guessing'
  )
  verdict = holds(min(raw) > 0.98 * chance, restated=min(raw) > max(scaled))
  return verdict, text


R31 = Claim(
  title='Logits are divided by the root of the width',
  tier='b',
  measure=scaled_logits,
  seeds=(0, 1),
  statements=(
    within(
      'Products of queries and keys grow like the root of the width',
      'S002 Why √d_k?',
      'variance grows with d_k',
      'slope',
      0.49,
      0.51,
    ),
    within(
      'Of raw scores of 512 channels most lie in [-45, 45]',
      'S002 Why √d_k?',
      '[-45, +45]',
      'inside 45',
      0.9,
      1,
      unit='of 4 million',
    ),
    within(
      'Of scaled scores most lie in [-3, 3]',
      'S002 Why √d_k?',
      '[-3, +3]',
      'inside 3',
      0.9,
      1,
      unit='of 4 million',
    ),
    within(
      'Scaled, their variance does not depend on the width',
      'S002 Why √d_k?',
      'variance = 1 (constant)',
      'scaled slope',
      -0.01,
      0.01,
      unit='as exponent of the deviation',
    ),
    scaling_takes_45_to_3,
    raw_scores_are_one_hot,
    raw_gradients_vanish,
    raw_scores_do_not_train,
  ),
)

SCALING = {'R31': R31}
