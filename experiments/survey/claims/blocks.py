"""Norms, feed-forward layers, order of tokens and vanishing gradients."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import ops
from efficient_attn.layers.ffn import GLU, MLP
from efficient_attn.layers.norm import LayerNorm, RMSNorm
from efficient_attn.models import cost
from experiments import page
from experiments.benchmarks.timing import interleaved
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  RESTATED,
  UNDEFINED,
  Claim,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.models import forward_flops, parameters
from experiments.survey.sources import OURS

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
      name: functools.partial(jax.jit(norm.__call__), x)
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


@statement(
  'RMSNorm is 10 to 15 percent faster than LayerNorm',
  'S003 Normalization Evolution',
  '10-15%',
  rule='5 to 20 percent at all three shapes in each of three turns; else it '
  'depends on shape and machine, which the source does not name',
)
def rms_norm_is_faster_everywhere(v):
  gains = [
    [ratio - 1 for ratio in v['norms'][f'{rows}x{width}']]
    for rows, width in SHAPES
  ]
  form = '{0:+.0%} to {1:+.0%} at {2[0]} x {2[1]}'
  text = listed(form, map(min, gains), map(max, gains), SHAPES)
  near = all(0.05 < gain < 0.2 for turns in gains for gain in turns)
  return HOLDS if near else UNDEFINED, text


@statement(
  'SwiGLU takes the place of an MLP with GELU at the same size',
  f'{OURS}, on S003 Activation Functions',
  rule="within 3 percent, at the framework's width of 8/3 D",
)
def swiglu_is_as_large(v):
  size, flops = v['glu_parameters'], v['glu_flops']
  text = f'{size:.3f} of the parameters and {flops:.3f} of the FLOPs'
  return holds(abs(size - 1) < 0.03 and abs(flops - 1) < 0.03), text


@statement(
  'After 50 steps an RNN keeps 1e-5 of the gradient',
  'S003 Why RNNs Failed for Long Sequences',
  '0.00001',
  rule='between 1e-6 and 1e-4 in all four cases; restated if below 1e-2 in '
  'all; not well defined if it shrinks, but by any factor',
  provenance=DERIVED,
)
def gradients_vanish(v):
  kept = v['rnn'].values()
  text = listed('{1:.1e} at {0}', v['rnn'], kept)
  if max(kept) > 0.5:
    return FAILS, text
  if all(1e-6 < x < 1e-4 for x in kept):
    return HOLDS, text
  return RESTATED if max(kept) < 1e-2 else UNDEFINED, text


def _note(v) -> list:
  return [
    page.Text(
      f'LayerNorm needs {v["norms"]["operations"]:.2f} times the elementwise '
      'operations of RMSNorm. In attention the first of 50 tokens gets '
      f'{v["attention"]:.2f} times the gradient of the last.',
      note=True,
    )
  ]


R36 = Claim(
  title='Norms, gated units, order of tokens and vanishing gradients',
  tier='b',
  measure=blocks,
  seeds=(0,),
  parts=_note,
  statements=(
    rms_norm_is_faster_everywhere,
    within(
      'Attention without positions does not see the order of tokens',
      'S003 Positional Encoding',
      'permutation-invariant',
      'permuted',
      0,
      1e-5,
      unit='largest difference',
    ),
    swiglu_is_as_large,
    gradients_vanish,
  ),
)

BLOCKS = {'R36': R36}
