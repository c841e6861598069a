"""What a guide to Transformers says of their parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_attn import models, ops
from efficient_attn.layers.ffn import MLP
from efficient_attn.layers.mixers import build_mixer
from efficient_attn.layers.norm import LayerNorm, RMSNorm
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  Claim,
  Statement,
  elsewhere,
  equals,
  within,
)
from experiments.survey.claims.arithmetic import GPT3
from experiments.survey.claims.linear_forms import loops
from experiments.survey.models import (
  cache_bytes,
  mixer,
)

N, D, HEADS, H = 32, 64, 4, 16
LENGTHS = (256, 1024)


def normal(*shape: int, seed: int = 0) -> jax.Array:
  """Normal numbers."""
  drawn = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(drawn, jnp.float32)


def turns() -> dict[str, float]:
  """Steps one after another: of an LSTM as an exponent, and of attention."""

  def count(op, length, arrays):
    x = (jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32),) * arrays
    return loops(jax.make_jaxpr(op)(*x).jaxpr)

  lstm = functools.partial(ops.slstm, recurrent=jnp.ones((4, 1, H, H)))
  dense = functools.partial(ops.attention, implementation='reference')
  return dict(
    lstm_turns=slope(LENGTHS, [count(lstm, n, 4) for n in LENGTHS]),
    attention_turns=max(count(dense, n, 3) for n in LENGTHS),
  )


def reach() -> dict[str, float]:
  """Rows that change with the last token, of N: both ways, and causal.

  And how much the last row of causal attention changes with the first token.
  """
  x, found = normal(1, N, D), {}
  for name, causal in (('encoder', False), ('decoder', True)):
    module = build_mixer(
      'attention',
      d_model=D,
      num_heads=HEADS,
      causal=causal,
      rngs=nnx.Rngs(0),
    )
    out, last, first = (
      module(y)[0][0] for y in (x, x.at[:, -1].add(1), x.at[:, 0].add(1))
    )
    found[f'{name} rows'] = int((jnp.abs(last - out).max(-1) > 1e-6).sum())
  return found | dict(path=float(jnp.abs(first - out)[-1].max()))


def positions() -> dict[str, float]:
  """Sinusoids against the printed formula, and rotated products."""
  at, pairs = np.arange(512.0), np.arange(D // 2)
  angles = at[:, None] / 10000 ** (2 * pairs / D)
  wanted = np.concatenate([np.sin(angles), np.cos(angles)], -1)
  q, k = normal(2, 1, N, 1, H)

  def logits(first, second):
    turned = ops.rotary(q, first), ops.rotary(k, second)
    return jnp.einsum('btnh,bsnh->ts', *turned)

  here = jnp.arange(N)
  plain = logits(here, here)
  return dict(
    sinusoidal=largest(ops.sinusoidal(jnp.arange(512), D), wanted),
    rotary_both=largest(logits(here + 100, here + 100), plain),
    rotary_one=largest(logits(here + 100, here), plain),
  )


def parts() -> dict[str, float]:
  """Norms of shifted inputs, an FFN on permuted tokens, jumps of gradients."""
  x = 3 + 5 * normal(N, D)
  found = {}
  for name, norm in (('layer', LayerNorm(D)), ('rms', RMSNorm(D))):
    y = np.asarray(norm(x), np.float64)
    found[f'{name} mean'] = float(np.abs(y.mean(-1)).mean())
    found[f'{name} size'] = float((y**2).mean())
  mlp, order = MLP(D, 0, jax.nn.gelu, rngs=nnx.Rngs(0)), np.arange(N)[::-1]
  found['ffn'] = largest(mlp(x[None, order])[0], mlp(x[None])[0, order])
  grid = jnp.linspace(-1, 1, 2001)
  for name, function in (('relu', jax.nn.relu), ('silu', jax.nn.silu)):
    slopes = jax.vmap(jax.grad(function))(grid)
    found[f'{name} jump'] = float(jnp.abs(jnp.diff(slopes)).max())
  return found


def measure() -> dict:
  """R45: all of these."""
  heads = mixer('attention', 512, 8)
  return (
    turns()
    | reach()
    | positions()
    | parts()
    | dict(
      d_k=cache_bytes(heads, 1) / (2 * 2 * 8),  # keys and values, 16 bits
      gpt3=models.parameter_count(GPT3) / 1e9,
    )
  )


ROUNDING = 1e-5
TERMS = 'float32 rounds sums of 32 terms to 32 x 6e-8 at the worst'


def one_by_one(values) -> str:
  """An LSTM takes as many steps as tokens."""
  return HOLDS if abs(values['lstm_turns'] - 1) < 0.05 else FAILS


def shown_turns(values) -> str:
  """The exponent."""
  return f'N^{values["lstm_turns"]:.2f} turns of loops'


def direct(values) -> str:
  """One layer, without a loop, takes the first token to the last."""
  path = values['path'] > 1e-3 and not values['attention_turns']
  return HOLDS if path else FAILS


def shown_path(values) -> str:
  """What arrives, and after how many turns."""
  return (
    f'the first of {N} tokens moves the last row by {values["path"]:.2f} in '
    f'one layer, {values["attention_turns"]} turns of loops'
  )


def two_ways(values) -> str:
  """All rows see the last token of an encoder, one that of a decoder."""
  rows = values['encoder rows'], values['decoder rows']
  return HOLDS if rows == (N, 1) else FAILS


def shown_ways(values) -> str:
  """Rows that see the last token."""
  return (
    f'the last token changes {values["encoder rows"]} of {N} rows of an '
    f'encoder and {values["decoder rows"]} of a decoder'
  )


def relative(values) -> str:
  """Products change with one position, not with both."""
  still = values['rotary_both'] < 1e-4 < 0.1 < values['rotary_one']
  return HOLDS if still else FAILS


def shown_rotary(values) -> str:
  """Both changes."""
  return (
    f'products change by {values["rotary_both"]:.1e} if all positions move by '
    f'100, by {values["rotary_one"]:.2f} if those of queries do'
  )


def norms(values) -> str:
  """Both have size one; one has mean zero."""
  sizes = [values[f'{name} size'] for name in ('layer', 'rms')]
  size = all(abs(x - 1) < 1e-3 for x in sizes)
  mean = values['layer mean'] < 1e-3 < 0.1 < values['rms mean']
  return HOLDS if size and mean else FAILS


def shown_norms(values) -> str:
  """Means and sizes."""
  return ', '.join(
    f'{said}: mean {values[f"{name} mean"]:.2f}, square '
    f'{values[f"{name} size"]:.3f}'
    for name, said in (('layer', 'LayerNorm'), ('rms', 'RMSNorm'))
  )


def smoother(values) -> str:
  """The gradient of one jumps."""
  return HOLDS if 100 * values['silu jump'] < values['relu jump'] else FAILS


def shown_jumps(values) -> str:
  """Both jumps."""
  return ', '.join(
    f'{name} {values[f"{name} jump"]:.1g}' for name in ('relu', 'silu')
  )


R45 = Claim(
  title='Parts of a Transformer',
  tier='b',
  measure=measure,
  seeds=(0, 1),
  statements=(
    Statement(
      says='A recurrent network takes its tokens one after another',
      source='S003 Why RNNs Failed for Long Sequences',
      printed="O(n); Can't parallelize",
      measured=shown_turns,
      judge=one_by_one,
      rule='exponent of the turns of loops of an LSTM within 0.05 of 1',
    ),
    Statement(
      says='Attention takes a token to any other by a path of O(1)',
      source='S003 Self-Attention: Direct Connections',
      printed='O(1) path length',
      measured=shown_path,
      judge=direct,
      rule='above 1e-3 in one causal layer, without a loop',
    ),
    Statement(
      says='Encoders see all tokens, decoders only past ones',
      source='S003 Encoder vs Decoder',
      printed='sees all tokens; sees only past',
      measured=shown_ways,
      judge=two_ways,
      rule='every row of the encoder changes, and the last of the decoder',
    ),
    equals(
      '8 heads of a model of width 512 have d_k = 64',
      'S003 Multi-Head Attention',
      'd_k=64',
      'd_k',
      64,
      tolerance=0,
      unit='numbers in the cache for a key of a head',
    ),
    within(
      'Sinusoidal positions are sin(pos / 10000^(2i/d)) and the cosine',
      'S003 Sinusoidal (2017)',
      'sin(pos/10000^(2i/d))',
      'sinusoidal',
      0,
      1e-4,
      reason='float32 rounds an angle of 512 to 3e-5',
    ),
    Statement(
      says='RoPE puts positions into the computation of attention',
      source='S003 RoPE (2023+)',
      printed='encoded in the attention computation itself',
      measured=shown_rotary,
      judge=relative,
      rule='products of queries and keys change by less than 1e-4, of float32, '
      'with all positions, and by more than 0.1 with those of queries',
    ),
    within(
      'The feed-forward network is applied identically to each position',
      'S003 Feed-Forward Network',
      'identically to each position',
      'ffn',
      0,
      ROUNDING,
      unit='when tokens are put in another order',
      reason=TERMS,
    ),
    Statement(
      says='LayerNorm normalizes mean and variance, RMSNorm only the scale',
      source='S003 Normalization Evolution',
      printed='mean and variance; Only normalizes scale',
      measured=shown_norms,
      judge=norms,
      rule='squares of 1 to 1e-3 from inputs of mean 3; a mean below 1e-3, '
      'and above 0.1',
    ),
    Statement(
      says='SwiGLU has smoother gradients than ReLU',
      source='S003 Activation Functions',
      printed='smoother gradients than ReLU',
      measured=shown_jumps,
      judge=smoother,
      rule='the largest jump of the derivative in steps of 0.001 is a '
      'hundredth or less',
    ),
    equals(
      'GPT-3 has 175B parameters',
      'S003 2020: GPT-3 & Scaling',
      '175B',
      'gpt3',
      175,
      tolerance=0.01,
      unit='B',
    ),
    elsewhere(
      'The largest model of 2024 has 1.8T parameters',
      'S003 Evolution Timeline',
      '1.8T',
      'no model of that size is published',
    ),
    elsewhere(
      'The PyTorch module of the guide computes multi-head attention',
      'S003 Complete Implementation',
      'Full PyTorch implementation of multi-head attention',
      'torch, which is no dependency: `pip install -e .[oracle]`, then `python '
      '-m pytest tests/interop/transformer_blocks_test.py -k gpt2` holds our '
      'attention against that of a model in PyTorch',
    ),
    elsewhere(
      'Each head learns relations of its own, as syntax and coreference',
      'S003 Multi-Head Attention',
      'syntax, semantics, coreference',
      'probes of a large trained model on annotated text',
    ),
  ),
)

TRANSFORMER_GUIDE = {'R45': R45}
