"""Our xLSTM mixers and the layers of xlstm, by its authors, as weights.

Imported after `pytest.importorskip('xlstm')`.
"""

import functools

import numpy as np

from tests.interop.low_rank_blocks import pair
from tests.interop.pairs import D, N, Pair, build, into, put, randomize

H = D // N


def slstm(length) -> Pair:
  """In theirs the weights called forget gate make the input gate."""
  from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

  theirs = sLSTMLayer(
    sLSTMLayerConfig(
      embedding_dim=D,
      num_heads=N,
      backend='vanilla',
      dtype='float32',
      enable_automatic_mixed_precision=False,
    )
  ).eval()
  w = randomize(theirs)
  ours = build('slstm')
  put(ours.conv.weight, into(w['conv1d.conv.weight'][:, 0]))
  put(ours.conv.bias, w['conv1d.conv.bias'])
  for mine, name in (
    (ours.i, 'fgate'),
    (ours.f, 'igate'),
    (ours.z, 'zgate'),
    (ours.o, 'ogate'),
  ):
    put(mine.weight, w[f'{name}.weight'].swapaxes(1, 2))
  # Theirs are i, f, z, o; ours z, i, f, o.
  order = [2, 0, 1, 3]
  recurrent = w['slstm_cell._recurrent_kernel_'].reshape(N, 4, H, H)
  put(ours.recurrent, recurrent.transpose(1, 0, 3, 2)[order])
  put(ours.bias, w['slstm_cell._bias_'].reshape(4, N, H)[order])
  put(ours.norm.scale, 1 + w['group_norm.weight'])
  return pair(ours, theirs)


def mlstm(length) -> Pair:
  """Theirs without the 1e-6 that it adds to the denominator."""
  from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig

  theirs = mLSTMLayer(
    mLSTMLayerConfig(embedding_dim=D, num_heads=N, context_length=length)
  ).eval()
  w = randomize(theirs, **{'mlstm_cell.fgate.bias': 2.0})
  cell = theirs.mlstm_cell
  cell.backend_fn = functools.partial(cell.backend_fn, eps=0.0)
  ours = build('mlstm', chunk_size=16)
  up, gate = np.split(w['proj_up.weight'], 2)
  put(ours.up.weight, into(up))
  put(ours.gate.weight, into(gate))
  put(ours.conv.weight, into(w['conv1d.conv.weight'][:, 0]))
  put(ours.conv.bias, w['conv1d.conv.bias'])
  for mine, name in ((ours.query, 'q'), (ours.key, 'k'), (ours.value, 'v')):
    put(mine, w[f'{name}_proj.weight'].swapaxes(1, 2))
  for projection, bias, name in (
    (ours.input_gate, ours.input_bias, 'igate'),
    (ours.forget_gate, ours.forget_bias, 'fgate'),
  ):
    # Theirs reads all of q, then k, then v; ours the three of each head.
    weight = w[f'mlstm_cell.{name}.weight'].reshape(N, 3, N, -1)
    put(projection.weight, into(weight.swapaxes(1, 2).reshape(N, -1)))
    put(bias, w[f'mlstm_cell.{name}.bias'])
  put(ours.norm.scale, 1 + w['mlstm_cell.outnorm.weight'])
  put(ours.skip, w['learnable_skip'])
  put(ours.out.weight, into(w['proj_down.weight']))
  return pair(ours, theirs)


BLOCKS = {f.__name__: f for f in (mlstm, slstm)}
