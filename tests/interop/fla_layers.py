"""Runs layers of flash-linear-attention on a CPU, and sets weights from them.

Imported after `pytest.importorskip('fla')`. Their layers call GPU kernels; on
a CPU the references of the same package take the place of these, and PyTorch's
convolution, norm and rotation that of what is fused there.
"""

import importlib
from unittest import mock

import torch
from torch.nn import functional

from tests.interop.pairs import Pair, into, put


def reference(folder, name):
  return getattr(importlib.import_module(f'fla.ops.{folder}'), name)


def rms(x, norm):
  """Normalises the last axis by the epsilon and the weight of `norm`."""
  return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


class Conv(torch.nn.Module):
  """Runs the causal convolution of a `ShortConvolution` in PyTorch."""

  def __init__(self, theirs):
    super().__init__()
    self.theirs = theirs

  def forward(self, x, **_):
    y = torch.nn.Conv1d.forward(self.theirs, x.mT)[..., : x.shape[1]].mT
    return functional.silu(y) if self.theirs.activation else y, None


def layer_pair(ours, layer, **kernels) -> Pair:
  """A pair whose other half runs with `kernels` in place of its module's."""
  module = importlib.import_module(type(layer).__module__)

  def run(x):
    with mock.patch.multiple(module, **kernels):
      return layer(x)[0]

  return Pair(ours, run, dict)


def put_all(w, *pairs) -> None:
  """Sets parts of ours by the names of theirs."""
  for mine, name in pairs:
    put(mine.weight, into(w[f'{name}.weight']))
    if mine.bias is not None:
      put(mine.bias, w[f'{name}.bias'])


def put_qkv(ours, w) -> None:
  names = 'q_proj', 'k_proj', 'v_proj', 'o_proj'
  mine = ours.qkv.query, ours.qkv.key, ours.qkv.value, ours.out
  put_all(w, *zip(mine, names, strict=True))


def put_convs(layer, ours, w, *names) -> None:
  """Sets our convolutions, and puts PyTorch's into the layer."""
  for mine, name in zip(ours, names, strict=True):
    put(mine.weight, into(w[f'{name}_conv1d.weight'][:, 0]))
    setattr(layer, f'{name}_conv1d', Conv(getattr(layer, f'{name}_conv1d')))


def put_gated_output(ours, w, norm) -> None:
  put(ours.gate.weight, into(w['g_proj.weight']))
  put(ours.norm.scale, w[f'{norm}.weight'])
  put(ours.out.weight, into(w['o_proj.weight']))


def gated_norm(norm):
  """Lets a `FusedRMSNormGated` run in PyTorch."""
  norm.forward = lambda o, g: rms(o, norm) * functional.silu(g)


def plain_norm(norm):
  """Lets an `RMSNorm` of each head run in PyTorch."""
  norm.forward = lambda o: rms(o, norm)
