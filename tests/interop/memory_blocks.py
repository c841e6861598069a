"""Routed and compressed attention and modules of lucidrains, as weights.

Imported after `pytest.importorskip('torch')`. Where the two differ by choice
the docstring says what makes the difference vanish.
"""

import functools
from unittest import mock

import numpy as np
import torch

from tests.interop.library_blocks import EYE, H, draw, heads_of, join, split
from tests.interop.low_rank_blocks import pair, put_qkv
from tests.interop.pairs import D, N, Pair, build, into, put, randomize


def routing(length) -> Pair:
  """The encoder: balanced clusters of normalised queries and keys."""
  from routing_transformer import routing_transformer as module

  # Where they divide by counts they add 1e-5, even to a count of 1.
  mean = functools.partial(module.scatter_mean, eps=1e-12)
  clusters, size = 4, 8
  theirs = module.KmeansAttention(clusters, size, N, H).eval()
  ours = build(
    'routing',
    causal=False,
    position='none',
    num_clusters=clusters,
    cluster_size=size,
  )
  weights = [draw(D, D, seed=i) for i in range(3)]
  for name, a in zip(('query', 'key', 'value'), weights, strict=True):
    put(getattr(ours, name).weight, into(a))
  put(ours.out.weight, EYE)
  means = draw(N, clusters, H, scale=1.0, seed=3)
  put(ours.centroids, means)
  theirs.kmeans.means.copy_(torch.from_numpy(means))
  theirs.kmeans.initted.fill_(True)

  def run(x):
    q, k, v = (split(x @ torch.from_numpy(a).T) for a in weights)
    q, k = (torch.nn.functional.layer_norm(a, (H,), eps=1e-6) for a in (q, k))
    with mock.patch.object(module, 'scatter_mean', mean):
      return join(theirs(q, k, v)[0])

  return pair(ours, run)


def sinkhorn(length) -> Pair:
  """The encoder, whose R is ours and whose Gumbel noise is none.

  In theirs the sorted values are the sorted keys, so that both get the same.
  """
  from sinkhorn_transformer import sinkhorn_transformer as module

  size, steps, temperature = 5, 6, 0.75
  theirs = module.SinkhornAttention(
    size,
    D,
    H,
    N,
    length,
    non_permutative=False,
    sinkhorn_iter=steps,
    temperature=temperature,
  ).eval()
  ours = build(
    'sinkhorn',
    causal=False,
    position='none',
    block_size=size,
    max_blocks=length // size,
    iterations=steps,
    temperature=temperature,
  )
  a, b = (draw(D, D, seed=i) for i in range(2))
  project = heads_of(ours, dict(q=a, k=b, v=b))
  hidden = draw(D, D, seed=2), draw(D, seed=3)
  sort = draw(D, N, length // size, seed=4), draw(N, length // size, seed=5)
  for mine, (weight, bias) in ((ours.hidden, hidden), (ours.sort, sort)):
    put(mine.weight, weight)
    put(mine.bias, bias)

  def order(x):
    means = x.unflatten(1, (-1, size)).mean(2)
    z = torch.relu(
      means @ torch.from_numpy(hidden[0]) + torch.tensor(hidden[1])
    )
    r = torch.einsum('bid,dnj->bnij', z, torch.from_numpy(sort[0]))
    r = torch.relu(r + torch.from_numpy(sort[1])[:, None]).flatten(0, 1)
    # As a logarithm of theirs gives back R.
    return module.gumbel_sinkhorn(torch.exp(r), steps, temperature)

  def run(x):
    theirs.sort_net.forward = lambda q, k, topk: order(x)
    with mock.patch.object(module, 'sample_gumbel', lambda *_: 0.0):
      return join(theirs(*project(x)))

  return pair(ours, run)


def compressive(length) -> Pair:
  """Theirs takes one segment a call, and has no biases u and w.

  It detaches what it compresses; ours does so only between calls.
  """
  from compressive_transformer_pytorch import (
    compressive_transformer_pytorch as module,
  )

  memory, slots, rate = 8, 3, 2
  theirs = module.SelfAttention(
    D, memory, memory, slots, cmem_ratio=rate, heads=N
  ).eval()
  w = randomize(theirs)
  theirs.to_out.bias.data.zero_()
  theirs.compress_mem_fn.conv.bias.data.zero_()
  ours = build(
    'compressive',
    mem_len=memory,
    compressed_len=slots,
    compression_rate=rate,
    compression='conv',
  )
  key, value = np.split(w['to_kv.weight'], 2)
  put_qkv(ours.qkv, w['to_q.weight'], key, value)
  put(ours.taps, w['compress_mem_fn.conv.weight'].transpose(2, 1, 0))
  put(ours.out.weight, into(w['to_out.weight']))
  relative = draw(D, N, H, seed=7)
  put(ours.relative.weight, relative)
  for bias in (ours.relative.content_bias, ours.relative.position_bias):
    put(bias, np.zeros((N, H), np.float32))
  places = np.arange(2 * memory + slots)[::-1, None]
  rates = 10_000.0 ** (-np.arange(0, D, 2) / D)
  waves = np.concatenate([np.sin(places * rates), np.cos(places * rates)], 1)
  rows = np.einsum('pd,dnh->nph', waves, relative).astype(np.float32)

  def run(x, state=None):
    out, memories = [], None if state is None else state.get('memories')
    with mock.patch.object(torch.Tensor, 'detach', lambda x: x):
      for part in x.split(memory, 1):
        y, memories, _ = theirs(part, memories, torch.from_numpy(rows))
        out.append(y)
    if state is not None:
      state['memories'] = memories
    return torch.cat(out, 1)

  return Pair(ours, run, dict)


BLOCKS = {f.__name__: f for f in (compressive, routing, sinkhorn)}
