"""Our mixers and modules of several libraries with the same weights.

Imported after `pytest.importorskip('torch')`. Where the two differ by choice
the weights, an option or a part put aside make the difference vanish, and the
docstring says so.
"""

import functools

import numpy as np
import torch

from tests.interop.low_rank_blocks import (
  no_biases,
  pair,
  put_cross,
  put_norm,
  put_qkv,
)
from tests.interop.pairs import D, N, Pair, build, into, put, randomize

H = D // N
EYE = np.eye(D, dtype=np.float32)


def split(x):
  """Heads first, as most of them want: [B, N, T, H]."""
  return x.unflatten(-1, (N, -1)).transpose(1, 2)


def join(x):
  return x.transpose(1, 2).flatten(2)


def heads_of(ours, w, names=('q', 'k', 'v')):
  """Projections [D, D] for `ours.qkv`, drawn here, as functions of x."""
  weights = [w[name] for name in names]
  put_qkv(ours.qkv, *weights)
  put(ours.out.weight, EYE)
  return lambda x: [split(x @ torch.from_numpy(a).T) for a in weights]


def draw(*shape, scale=0.3, seed=0):
  rng = np.random.default_rng(seed)
  return (scale * rng.standard_normal(shape)).astype(np.float32)


def linformer(length) -> Pair:
  from linformer import LinformerSelfAttention

  theirs = LinformerSelfAttention(D, length, k=6, heads=N).eval()
  w = randomize(theirs)
  no_biases(*theirs.modules())
  ours = build('linformer', causal=False, rank=6, max_len=length)
  put_qkv(ours.qkv, *(w[f'to_{x}.weight'] for x in 'qkv'))
  put(ours.key_rows, w['proj_k'].T)
  put(ours.value_rows, w['proj_v'].T)
  put(ours.out.weight, into(w['to_out.weight']))
  return pair(ours, theirs)


class HeadRMSNorm(torch.nn.Module):
  """The norm of ours for channels [B, heads * dim, 1, T]."""

  def __init__(self, dim, scale):
    super().__init__()
    self.dim, self.scale = dim, scale

  def forward(self, x):
    x = x.unflatten(1, (-1, self.dim))
    x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + 1e-6)
    return (x * self.scale[:, None, None]).flatten(1, 2)


def lambda_network(length) -> Pair:
  """An image of one row; our RMS norms take the place of batch norms."""
  from lambda_networks import LambdaLayer

  key_dim, window = 6, 5
  theirs = LambdaLayer(D, dim_k=key_dim, r=window, heads=N).eval()
  w = randomize(theirs)
  theirs.pos_conv.bias.data.zero_()
  ours = build('lambda_network', causal=False, key_dim=key_dim, window=window)
  for name, norm in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    weight = w[f'to_{norm}.weight'][..., 0, 0]
    put(getattr(ours, name).weight, weight.T)
  for norm, dim in (('q', key_dim), ('v', H)):
    scale = 1 + draw(dim)
    mine = ours.query_norm if norm == 'q' else ours.value_norm
    put(mine.scale, scale)
    setattr(theirs, f'norm_{norm}', HeadRMSNorm(dim, torch.from_numpy(scale)))
  # Of the square window of theirs the one row meets the middle.
  put(ours.embedding, w['pos_conv.weight'][:, 0, 0, window // 2].T)

  def run(x):
    return theirs(x.mT[:, :, None])[:, :, 0].mT

  return pair(ours, run)


def set_transformer(length) -> Pair:
  """Their first block, and of the second, a block of its own, what reads."""
  from torch_geometric.nn.aggr.utils import InducedSetAttentionBlock

  theirs = InducedSetAttentionBlock(D, num_induced_points=5, heads=N).eval()
  w = randomize(
    theirs,
    **{f'mab{i}.layer_norm{j}.weight': 1.0 for i in (1, 2) for j in (1, 2)},
  )
  ours = build('set_transformer', causal=False, num_latents=5)
  put(ours.latents, w['ind'])
  for mine, name in ((ours.attention, 'mab1'), (ours.read, 'mab2')):
    getattr(theirs, name).attn.in_proj_bias.data.zero_()
    getattr(theirs, name).attn.out_proj.bias.data.zero_()
    qkv = np.split(w[f'{name}.attn.in_proj_weight'], 3)
    put_cross(mine, *qkv, w[f'{name}.attn.out_proj.weight'])
  put_norm(ours.norm, w, 'mab1.layer_norm1')
  put_norm(ours.feed_norm, w, 'mab1.layer_norm2')
  put(ours.feed.weight, w['mab1.lin.weight'].T)
  put(ours.feed.bias, w['mab1.lin.bias'])
  for norm in (theirs.mab1.layer_norm1, theirs.mab1.layer_norm2):
    norm.eps = ours.norm.eps

  def run(x):
    z = theirs.mab1(theirs.ind.expand(len(x), -1, -1), x)
    return theirs.mab2.attn(x, z, z, need_weights=False)[0]

  return pair(ours, run)


def entmax(length) -> Pair:
  """alpha-entmax of our logits by bisection, a different alpha a head."""
  from entmax import entmax_bisect

  ours = build('entmax', causal=False, position='none')
  project = heads_of(ours, {x: draw(D, D, seed=i) for i, x in enumerate('qkv')})
  alpha = draw(N, scale=1.0, seed=3)
  put(ours.weights.alpha, alpha)
  powers = 1 + torch.sigmoid(torch.from_numpy(alpha))[:, None, None]

  def run(x):
    q, k, v = project(x)
    logits = q @ k.mT / H**0.5
    powers_ = powers[None].expand(len(x), N, logits.shape[-2], 1)
    return join(entmax_bisect(logits, powers_, dim=-1, n_iter=60) @ v)

  return pair(ours, run)


def additive(length) -> Pair:
  """A layer of theirs a head, between our projections."""
  from keras import layers

  ours = build('additive', causal=False)
  project = heads_of(ours, {x: draw(D, D, seed=i) for i, x in enumerate('qkv')})
  rows, columns, weight = (
    draw(N, H, H, seed=3),
    draw(N, H, H, seed=4),
    draw(N, H),
  )
  for p, value in zip(
    ours.weights.params, (rows, columns, weight), strict=True
  ):
    put(p, value)
  theirs = [layers.AdditiveAttention() for _ in range(N)]
  for layer, w in zip(theirs, weight, strict=True):
    layer.build([(None, length, H)] * 3)
    layer.set_weights([w])

  def run(x):
    q, k, v = project(x)
    q, k = q @ torch.from_numpy(rows), k @ torch.from_numpy(columns)
    heads = [f([q[:, i], v[:, i], k[:, i]]) for i, f in enumerate(theirs)]
    return torch.cat(heads, -1)

  return pair(ours, run)


def luong(length) -> Pair:
  """Their dot product of W q and k is the general score."""
  from keras import layers

  theirs = layers.Attention()
  ours = build('luong', causal=False)
  project = heads_of(ours, {x: draw(D, D, seed=i) for i, x in enumerate('qkv')})
  weight = draw(N, H, H, seed=3)
  put(ours.weights.params[0], weight)

  def run(x):
    q, k, v = project(x)
    q = q @ torch.from_numpy(weight)
    return torch.cat(
      [theirs([q[:, i], v[:, i], k[:, i]]) for i in range(N)], -1
    )

  return pair(ours, run)


def performer(length, causal=False) -> Pair:
  """Theirs without the small numbers that it adds to features and sums."""
  from performer_pytorch import performer_pytorch as module

  theirs = module.SelfAttention(
    D, heads=N, dim_head=H, nb_features=12, causal=causal
  ).eval()
  w = randomize(theirs)
  no_biases(*theirs.modules())
  ours = build('performer', causal=causal, nb_features=12, chunk_size=16)
  put_qkv(ours.qkv, *(w[f'to_{x}.weight'] for x in 'qkv'))
  put(ours.out.weight, into(w['to_out.weight']))
  put(ours.projection, theirs.fast_attention.projection_matrix.numpy())
  kernel = functools.partial(module.softmax_kernel, eps=0.0)
  attend = theirs.fast_attention
  if causal:
    read = functools.partial(attend.causal_linear_fn, eps=0.0)
  else:
    read = module.linear_attention

  def features(q, k, v):
    shared = dict(projection_matrix=attend.projection_matrix)
    q = kernel(q, is_query=True, **shared)
    return read(q, kernel(k, is_query=False, **shared), v)

  attend.forward = features
  return pair(ours, theirs)


def performer_decoder(length) -> Pair:
  return performer(length, causal=True)


def sana(length) -> Pair:
  from diffusers.models import attention_processor as module

  theirs = module.Attention(
    query_dim=D,
    heads=N,
    dim_head=H,
    bias=False,
    processor=module.SanaLinearAttnProcessor2_0(),
  ).eval()
  w = randomize(theirs)
  no_biases(*theirs.modules())
  ours = build('sana', causal=False, chunk_size=16)
  put_qkv(ours.qkv, *(w[f'to_{x}.weight'] for x in 'qkv'))
  put(ours.out.weight, into(w['to_out.0.weight']))
  return pair(ours, theirs)


BLOCKS = {
  f.__name__: f
  for f in (
    additive,
    entmax,
    lambda_network,
    linformer,
    luong,
    performer,
    performer_decoder,
    sana,
    set_transformer,
  )
}
