"""Scaled logits, norms, feed-forward layers, order and vanishing gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from efficient_attn import models, ops
from efficient_attn.config import LMConfig
from efficient_attn.data.tasks import TASKS
from efficient_attn.layers.ffn import GLU, MLP
from efficient_attn.layers.norm import LayerNorm, RMSNorm
from efficient_attn.models import cost
from efficient_attn.train.loss import cross_entropy
from experiments import page
from experiments.benchmarks.timing import interleaved
from experiments.exponent import slope
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  UNDEFINED,
  Claim,
  Statement,
  within,
)
from experiments.survey.models import forward_flops, parameters
from experiments.survey.sources import OURS

WIDTHS = (64, 128, 256, 512, 1024, 2048)
SCALES = {'raw': 1.0, 'scaled': None}  # None is the default, 1 / sqrt(H)


def dots() -> dict:
  """Four million products of normal vectors of each width."""
  found = dict(widths=list(WIDTHS), deviations=[])
  for width in WIDTHS:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2000, width), np.float32)
    scores = q @ k.T
    found['deviations'].append(float(scores.std()))
    if width == 512:
      found['inside 45'] = float((np.abs(scores) < 45).mean())
      found['inside 3'] = float((np.abs(scores) < 3 * width**0.5).mean())
      found['45 scaled'] = 45 / float(scores.std())
  found['slope'] = slope(WIDTHS, found['deviations'])
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

    none = jnp.zeros((1, 1, length, length))
    p = read(q, none, jnp.eye(length)[None, :, None])
    gradient, of_logits = jax.grad(
      lambda q, b, read=read: (read(q, b, v) * out).sum(), (0, 1)
    )(q, none)
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
    for period in model.stack.periods:
      for block in period.blocks:
        block.mixer.options['scale'] = scale
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


def _training(v) -> str:
  if min(v['raw loss']) > 0.98 * v['chance']:
    return HOLDS
  return RESTATED if min(v['raw loss']) > max(v['scaled loss']) else FAILS


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
      provenance=DERIVED,
    ),
    within(
      'Of raw scores of 512 channels most lie in [-45, 45]',
      'S002 Why √d_k?',
      '[-45, +45]',
      'inside 45',
      0.9,
      1,
      unit='of 4 million',
      provenance=DERIVED,
    ),
    within(
      'Of scaled scores most lie in [-3, 3]',
      'S002 Why √d_k?',
      '[-3, +3]',
      'inside 3',
      0.9,
      1,
      unit='of 4 million',
      provenance=DERIVED,
    ),
    Statement(
      says='Scaling takes [-45, 45] to [-3, 3]',
      source='S002 Why √d_k?',
      printed='[-45, +45], [-3, +3]',
      measured=lambda v: (
        f'45 -> {v["45 scaled"]:.2f}: two deviations, and 3 are three'
      ),
      judge=lambda v: HOLDS if abs(v['45 scaled'] / 3 - 1) < 0.1 else FAILS,
      rule='45 over the measured deviation is 3 to 10 percent',
      provenance=DERIVED,
    ),
    Statement(
      says='Without the scale the softmax is nearly one-hot',
      source='S002 Why √d_k?',
      printed='one-hot',
      measured=lambda v: (
        f'largest of 512 weights {v["raw top"]:.3f}, scaled '
        f'{v["scaled top"]:.3f}'
      ),
      judge=lambda v: HOLDS if v['raw top'] > 0.8 > v['scaled top'] else FAILS,
      rule='mean over queries above 0.8 raw, and below it scaled',
    ),
    Statement(
      says='Without the scale gradients vanish',
      source='S002 Why √d_k?',
      printed='vanish',
      measured=lambda v: (
        f'sum p (1 - p) {v["raw jacobian"]:.3f} raw, '
        f'{v["scaled jacobian"]:.3f} scaled; gradient of the median row of '
        f'logits {v["raw logits"]:.3f}, {v["scaled logits"]:.3f}, but on '
        f'average {v["raw logits mean"]:.2f}, {v["scaled logits mean"]:.2f}, '
        f'and of queries {v["raw queries mean"]:.1f}, '
        f'{v["scaled queries mean"]:.2f}'
      ),
      judge=lambda v: (
        FAILS
        if v['raw logits'] > 0.2 * v['scaled logits']
        else HOLDS
        if v['raw queries'] < 0.2 * v['scaled queries']
        else RESTATED
      ),
      rule='at the median query a fifth or less, at the logits and at the '
      'query; restated if only at the logits',
    ),
    Statement(
      says='Without the scale training fails',
      source='S002 Why √d_k?',
      printed='fails',
      measured=lambda v: (
        'loss after 200 steps: raw {}, scaled {}, {:.2f} by guessing'.format(
          *(
            '-'.join(f'{f(v[k]):.2f}' for f in (min, max))
            for k in ('raw loss', 'scaled loss')
          ),
          v['chance'],
        )
      ),
      judge=_training,
      rule='no better than a guess by 2 percent; restated if every seed is '
      'worse than every scaled one (recall, 2 layers, H = 64, 3 seeds)',
    ),
  ),
)

SHAPES = ((4096, 1024), (4096, 4096), (1024, 8192))
# By name, recurrent gain and deviation of the inputs.
RNNS = {
  'gain 0.8': (0.8, 1),
  'gain 1': (1, 1),
  'gain 1.2': (1.2, 1),
  'gain 1, inputs of 0.1': (1, 0.1),
}


def norms() -> dict:
  """LayerNorm over RMSNorm: medians of time, three of each, and operations."""
  found = {}
  for shape in SHAPES:
    x = jax.random.normal(jax.random.key(0), shape)
    layers = {'rms': RMSNorm(shape[1]), 'layer': LayerNorm(shape[1])}
    calls = {
      name: functools.partial(jax.jit(lambda x, norm=norm: norm(x)), x)
      for name, norm in layers.items()
    }
    turns = [interleaved(calls, 7) for _ in range(3)]
    ratios = [seconds['layer'] / seconds['rms'] for seconds in turns]
    found['x'.join(map(str, shape))] = ratios
    counted = [cost.count(norm, x).operations for norm in layers.values()]
    found['operations'] = counted[1] / counted[0]
  return found


def rnn_gradient(gain: float, inputs: float, steps=50, width=64) -> float:
  """|dL/dh_1| / |dL/dh_50| of a tanh RNN, geometric mean of 10 seeds."""

  def one(key):
    a, b, c = jax.random.split(key, 3)
    w = gain * width**-0.5 * jax.random.normal(a, (width, width))
    x = inputs * jax.random.normal(b, (steps, width))

    def last(h):
      return jax.lax.scan(lambda h, x: (jnp.tanh(h @ w + x), None), h, x[1:])[0]

    out = jax.random.normal(c, (width,))
    _, pull = jax.vjp(last, jnp.tanh(x[0]))
    return jnp.log(jnp.linalg.norm(pull(out)[0]) / jnp.linalg.norm(out))

  logs = jax.vmap(one)(jax.random.split(jax.random.key(0), 10))
  return float(jnp.exp(logs.mean()))


def attention_gradient(steps=50, width=64) -> float:
  """The same of attention, over 64 sequences, from the last to the first."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 64, steps, 1, width))

  def last(v):
    return ops.attention(q, k, v, mask=ops.masks.Causal())[:, -1].sum()

  sizes = jnp.linalg.norm(jax.grad(last)(v)[:, :, 0], axis=-1).mean(0)
  return float(sizes[0] / sizes[-1])


def permuted() -> float:
  """The largest change when tokens are put in another order, and back."""
  x = jax.random.normal(jax.random.key(0), (3, 1, 64, 4, 16))
  order = jax.random.permutation(jax.random.key(1), 64)
  out = ops.attention(*x)
  moved = ops.attention(*x[:, :, order])
  return float(jnp.abs(moved - out[:, order]).max())


def feed_forward(width=768) -> dict:
  """Parameters and FLOPs of SwiGLU over those of an MLP of GELU."""
  layers = {
    'glu': nnx.eval_shape(lambda: GLU(width, 0, jax.nn.silu, rngs=nnx.Rngs(0))),
    'mlp': nnx.eval_shape(lambda: MLP(width, 0, jax.nn.gelu, rngs=nnx.Rngs(0))),
  }
  x = jax.ShapeDtypeStruct((1, 8, width), jnp.float32)
  sizes = {name: parameters(layer) for name, layer in layers.items()}
  flops = {name: forward_flops(layer, x) for name, layer in layers.items()}
  return dict(
    glu_parameters=sizes['glu'] / sizes['mlp'],
    glu_flops=flops['glu'] / flops['mlp'],
  )


def blocks() -> dict:
  """R36: the parts of a block beside attention."""
  return (
    dict(norms=norms(), permuted=permuted())
    | feed_forward()
    | dict(
      rnn={name: rnn_gradient(*case) for name, case in RNNS.items()},
      attention=attention_gradient(),
    )
  )


def _gains(v) -> list[list[float]]:
  """By shape, of each turn."""
  return [
    [ratio - 1 for ratio in v['norms']['x'.join(map(str, shape))]]
    for shape in SHAPES
  ]


R36 = Claim(
  title='Norms, gated units, order of tokens and vanishing gradients',
  tier='b',
  measure=blocks,
  seeds=(0,),
  parts=lambda v: [
    page.Text(
      f'LayerNorm needs {v["norms"]["operations"]:.2f} times the elementwise '
      'operations of RMSNorm. In attention the first of 50 tokens gets '
      f'{v["attention"]:.2f} times the gradient of the last.',
      note=True,
    )
  ],
  statements=(
    Statement(
      says='RMSNorm is 10 to 15 percent faster than LayerNorm',
      source='S003 Normalization Evolution',
      printed='10-15%',
      measured=lambda v: ', '.join(
        f'{min(gains):+.0%} to {max(gains):+.0%} at {shape[0]} x {shape[1]}'
        for shape, gains in zip(SHAPES, _gains(v), strict=True)
      ),
      judge=lambda v: (
        HOLDS
        if all(0.05 < gain < 0.2 for gain in sum(_gains(v), []))
        else UNDEFINED
      ),
      rule='5 to 20 percent at all three shapes in each of three turns; else '
      'it depends on shape and machine, which the source does not name',
    ),
    within(
      'Attention without positions does not see the order of tokens',
      'S003 Positional Encoding',
      'permutation-invariant',
      'permuted',
      0,
      1e-5,
      unit='largest difference',
    ),
    Statement(
      says='SwiGLU takes the place of an MLP with GELU at the same size',
      source=f'{OURS}, on S003 Activation Functions',
      measured=lambda v: (
        f'{v["glu_parameters"]:.3f} of the parameters and '
        f'{v["glu_flops"]:.3f} of the FLOPs'
      ),
      judge=lambda v: (
        HOLDS
        if all(abs(v[k] - 1) < 0.03 for k in ('glu_parameters', 'glu_flops'))
        else FAILS
      ),
      rule="within 3 percent, at the framework's width of 8/3 D",
    ),
    Statement(
      says='After 50 steps an RNN keeps 1e-5 of the gradient',
      source='S003 Why RNNs Failed for Long Sequences',
      printed='0.00001',
      measured=lambda v: ', '.join(
        f'{x:.1e} at {name}' for name, x in v['rnn'].items()
      ),
      judge=lambda v: (
        HOLDS
        if all(1e-6 < x < 1e-4 for x in v['rnn'].values())
        else FAILS
        if max(v['rnn'].values()) > 0.5
        else RESTATED
        if max(v['rnn'].values()) < 1e-2
        else UNDEFINED
      ),
      rule='between 1e-6 and 1e-4 in all four cases; restated if below 1e-2 in '
      'all; not well defined if it shrinks, but by any factor',
      provenance=DERIVED,
    ),
  ),
)

SCALING = {'R31': R31, 'R36': R36}
