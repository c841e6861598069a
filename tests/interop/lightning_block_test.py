"""Our lightning attention against that of MiniMax in transformers, on CPU.

Independent code with the same weights: the extra `oracle` installs it.
"""

import functools

import jax
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

T = 37


@functools.cache
def pair():
  """The second of three layers, in blocks of 8 tokens; ours in chunks of 16."""
  from transformers.models.minimax import modeling_minimax as hf

  from tests.interop.pairs import D, N, Pair, build, into, put, randomize

  layers, layer = 3, 1
  config = hf.MiniMaxConfig(
    hidden_size=D,
    num_attention_heads=N,
    num_hidden_layers=layers,
    layer_types=['linear_attention'] * layers,
    block_size=8,
  )
  theirs = hf.MiniMaxLightningAttention(config, layer_idx=layer).eval()
  w = randomize(theirs, norm=1.0)
  depth = layer / (layers - 1 + 1e-5)
  ours = build('lightning', chunk_size=16, depth=depth)
  rows = w['qkv_proj.weight'].reshape(N, 3, D // N, D)
  put(ours.qkv.query.weight, into(rows[:, 0]))
  put(ours.qkv.key.weight, into(rows[:, 1]))
  put(ours.qkv.value.weight, into(rows[:, 2]))
  put(ours.norm.scale, w['norm.weight'])
  put(ours.gate.weight, into(w['output_gate.weight']))
  put(ours.out.weight, into(w['out_proj.weight']))

  def run(x, cache=None):
    return theirs(x, None, None, cache)[0]

  return Pair(ours, run, hf.MiniMaxCache)


def test_outputs():
  from tests.interop import compare

  p, x = pair(), compare.inputs(T)
  y, _ = jax.jit(p.ours)(x)
  with torch.no_grad():
    expected = p.theirs(torch.from_numpy(x))
  assert compare.difference(y, expected) < compare.OUTPUTS


def test_gradients_of_the_inputs():
  from tests.interop import compare

  compare.check_gradients(pair(), T)


def test_prefill_and_decode():
  from tests.interop import compare

  compare.check_decoding(pair(), T, (20, 21, 22, T))
