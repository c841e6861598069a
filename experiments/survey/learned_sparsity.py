"""Attention that learns to be sparse: its weights, its mask, its span."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn.layers.mixers import build_mixer
from efficient_attn.ops import attention, masks, scores
from efficient_attn.ops.softmax.normalizers import (
  entmax,
  normalized_attention,
  softmax,
)
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope
from experiments.survey.models import mixer, parameters

ALPHAS = (1.0, 1.001, 1.25, 1.5, 1.75, 2.0)


def sparse_weights() -> dict:
  """alpha-entmax of 200 rows of 20 normal logits."""
  rng = np.random.default_rng(0)
  z = rng.standard_normal((200, 20))
  points = rng.dirichlet(np.ones(20), (50, 200))  # of the simplex
  found, gain = dict(zeros=[]), -np.inf
  with jax.enable_x64(True):
    for alpha in ALPHAS:
      p = np.asarray(entmax(jnp.asarray(z), jnp.full(200, alpha)))
      found['zeros'].append(float((p == 0).sum(1).mean()))

      def value(p, alpha=alpha):
        """What entmax is the largest of: p . z and an entropy of p."""
        if alpha == 1:
          entropy = -p * np.log(np.where(p > 0, p, 1))
        else:
          entropy = (p - p**alpha) / (alpha * (alpha - 1))
        return (p * z + entropy).sum(-1)

      for step in (1e-4, 1e-2, 1):
        moved = (1 - step) * p + step * points
        gain = max(gain, float((value(moved) - value(p)).max()))
    one = entmax(jnp.asarray(z), jnp.ones(200)) - jax.nn.softmax(z)
    return found | dict(gain=gain, softmax=float(jnp.abs(one).max()))


def slower() -> float:
  """Time of attention with entmax over that with softmax, with gradients."""
  rng = np.random.default_rng(0)
  q, k, v = jnp.asarray(rng.standard_normal((3, 1, 512, 4, 64)), jnp.float32)
  alpha = jnp.full((1, 4, 1), 1.5)
  runs = {}
  for name, normalize in (
    ('softmax', softmax),
    ('entmax', functools.partial(entmax, alpha=alpha)),
  ):

    def loss(q, k, v, normalize=normalize):
      return normalized_attention(q, k, v, normalize=normalize).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    runs[name] = functools.partial(grad, q, k, v)
  seconds = interleaved(runs, 5)
  return seconds['entmax'] / seconds['softmax']


def learned_mask() -> dict:
  """SparseBERT's mask: its parameters, its forced pairs, its draws."""
  length, reach = 24, (64, 256, 1024)
  plain = parameters(mixer('attention', 64, 4))
  sizes = [parameters(mixer('dam', 64, 4, reach=r)) - plain for r in reach]
  dam = build_mixer(
    'dam', d_model=16, num_heads=2, rngs=nnx.Rngs(0), causal=False, reach=8
  )
  alpha = dam.alpha[...]
  dam.alpha.set_value(-jnp.ones_like(alpha))  # no pair is the likelier one
  score = scores.Diagonal(dam.table(None))
  score = scores.Except(score, dam.ends(length, None))
  pairs = np.asarray(score.dense(length, length) > -jnp.inf)
  draws, gaps = 4000, []
  for value in (-2.0, 0.0, 1.0):
    dam.alpha.set_value(jnp.full_like(alpha, value))
    keys = jax.random.split(jax.random.key(0), draws)
    mask = np.asarray(jax.vmap(dam.table)(keys)) > np.log(0.5)
    p = 1 / (1 + np.exp(-value))
    gaps.append(float((mask.mean() - p) / np.sqrt(p * (1 - p) / mask.size)))
  return dict(
    growth=slope(reach, sizes),
    forced=[int(x) for x in pairs.sum((2, 3)).reshape(-1)],
    expected=4 * length - 4,
    gaps=gaps,
  )


def learned_spans() -> dict:
  """Keys of the last query for three spans, and spans of the whole length."""
  length, ramp, spans = 512, 32, (16, 64, 256)
  score = scores.SoftSpan(jnp.array(spans, jnp.float32), float(ramp))
  seen = np.asarray(score.dense(length, length))[0, :, -1] > -np.inf
  rng = np.random.default_rng(0)
  q, k, v = jnp.asarray(rng.standard_normal((3, 1, length, 3, 16)), jnp.float32)
  whole = scores.SoftSpan(jnp.full(3, float(length)), float(ramp))
  exact = attention(q, k, v, mask=masks.Causal())
  gap = attention(q, k, v, mask=masks.Causal(), bias=whole) - exact
  return dict(
    keys=[int(x) for x in seen.sum(1)],
    expected=[span + ramp for span in spans],
    whole=float(jnp.abs(gap).max()),
  )
