"""Our ops and the references of flash-linear-attention on the same arrays.

Imported after `pytest.importorskip('fla')`. Theirs are float32 PyTorch on any
device, the definitions that their GPU kernels are tested against.
"""

import dataclasses
import importlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import torch

from efficient_attn.ops import masks, scores
from efficient_attn.ops.recurrent.diagonal_scan import diagonal_scan
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.ops.recurrent.fast_weights import fast_weights
from efficient_attn.ops.recurrent.log_linear import log_linear_attention
from efficient_attn.ops.routed import nsa as nsa_ops
from efficient_attn.ops.softmax.attention import attention

B, T, N, H, V = 2, 37, 3, 6, 8
CHUNK = 8


@dataclasses.dataclass
class Case:
  """Two functions of the same arrays, by name; both return the output."""

  ours: Callable
  theirs: Callable
  arrays: dict[str, np.ndarray]


def theirs(folder, name):
  return getattr(importlib.import_module(f'fla.ops.{folder}'), name)


def draw(**shapes) -> dict[str, np.ndarray]:
  """Normal numbers of each shape, by name."""
  rng = np.random.default_rng(0)
  return {
    name: rng.standard_normal(shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def heads(length=T, **others) -> dict[str, np.ndarray]:
  """q, k, v and other arrays, [B, T, N, ...]."""
  shapes = dict(q=(H,), k=(H,), v=(V,)) | others
  return draw(**{k: (B, length, N, *shape) for k, shape in shapes.items()})


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def decays(x):
  """Logarithms of decays around 0.7."""
  return np.log(sigmoid(x + 1))


def hgrn() -> Case:
  """The recurrence alone; theirs has no complex channels."""
  reference = theirs('hgrn.naive', 'naive_recurrent_hgrn')
  arrays = draw(x=(B, T, N, H), g=(B, T, N, H))
  arrays['g'] = decays(arrays['g'])

  def run(x, g):
    return reference(x.flatten(2), g.flatten(2))[0].unflatten(2, (N, H))

  return Case(
    lambda x, g: diagonal_scan(x, log_decay=g, chunk_size=CHUNK)[0],
    run,
    arrays,
  )


def rwkv7() -> Case:
  """Its recurrence, of which RWKV-7 is kappa, -a kappa and k'."""
  reference = theirs('generalized_delta_rule.dplr.naive', 'dplr_recurrence')
  arrays = heads(w=(H,), kappa=(H,), rate=(H,))
  arrays['w'] = -np.exp(-0.5) * sigmoid(arrays['w'])
  arrays['kappa'] = unit(arrays['kappa'])
  arrays['rate'] = sigmoid(arrays['rate'])

  def ours(q, k, v, w, kappa, rate):
    options = dict(log_decay=w, chunk_size=CHUNK)
    return dplr(q, k, v, kappa, -kappa * rate, **options)[0]

  def run(**x):  # heads first
    q, k, v, w, kappa, rate = (a.transpose(1, 2) for a in x.values())
    return reference(q, k, v, kappa, -kappa * rate, w)[0].transpose(1, 2)

  return Case(ours, run, arrays)


def comba() -> Case:
  """The chunked reference: its recurrent one decays before it erases."""
  reference = theirs('comba.naive', 'naive_chunk_comba')
  arrays = heads(64, beta=(), g=())
  arrays['k'] = unit(arrays['k'])
  arrays['p'] = 0.7 * unit(arrays['k'] + 0.3 * arrays['q'])
  arrays['beta'] = sigmoid(arrays['beta'])
  arrays['g'] = decays(arrays['g'])

  def ours(g, beta, k, p, **x):
    write = beta[..., None] * k
    x |= dict(k=write, a=p, b=-write, log_decay=g)
    return dplr(**x, chunk_size=CHUNK)[0]

  def run(**x):
    return reference(**x, chunk_size=32)[0]

  return Case(ours, run, arrays)


def log_linear() -> Case:
  levels = 7
  reference = theirs('log_linear_attn.naive', 'naive_log_linear_attn')
  length = 40
  arrays = heads(length, g=(), level_scales=(levels,))
  arrays['g'] = decays(arrays['g'])
  arrays['level_scales'] = np.exp(arrays['level_scales'])

  def ours(g, **x):
    return log_linear_attention(**x, log_decay=g, scale=1, chunk_size=CHUNK)[0]

  return Case(ours, reference, arrays)


def fox() -> Case:
  reference = theirs('forgetting_attn.naive', 'naive_forgetting_attn')
  arrays = heads(g=())
  arrays['g'] = decays(arrays['g'])

  def ours(q, k, v, g):
    return attention(q, k, v, mask=masks.Causal(), bias=scores.Forget(g))

  return Case(ours, reference, arrays)


def nsa() -> Case:
  """The three branches of theirs summed, with compressed keys as given.

  Blocks are the frames that are compressed. The window is PyTorch's, as theirs
  needs a GPU.
  """
  compression, choice, selection = (
    theirs('nsa.naive', name)
    for name in (
      'naive_nsa_compression',
      'naive_nsa_topk',
      'naive_nsa_selection',
    )
  )
  block, top_k, window, length, groups = 4, 4, 5, 48, 2
  sizes = nsa_ops.Sizes(block, block, block, top_k, window)
  query, key = (B, length, 4, H), (B, length, groups, H)
  short = (B, length // block, groups, H)
  arrays = draw(
    q=query,
    k=key,
    v=key,
    short_k=short,
    short_v=short,
    near_k=key,
    near_v=key,
    gates=(*query[:3], 3),
  )

  def ours(q, k, v, short_k, short_v, near_k, near_v, gates):
    pairs = (short_k, short_v), (k, v), (near_k, near_v)
    return nsa_ops.nsa_attention(q, q, *pairs, gates, sizes=sizes)

  def run(q, k, v, short_k, short_v, near_k, near_v, gates):
    scale = H**-0.5
    blocks = choice(q, short_k, top_k, block, scale)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    near = torch.nn.functional.scaled_dot_product_attention(
      *(x.transpose(1, 2) for x in (q, near_k, near_v)),
      attn_mask=(distance >= 0) & (distance < window),
      enable_gqa=True,
    ).transpose(1, 2)
    compressed, _ = compression(q, short_k, short_v, block, scale)
    selected = selection(q, k, v, blocks, block)
    branches = torch.stack([compressed, selected, near], -1)
    return (branches * gates[..., None, :]).sum(-1)

  return Case(ours, run, arrays)


def ttt_linear() -> Case:
  """The weights after the last token: theirs answers with x W, not x, added.

  With one rate for all tokens, as theirs takes that of the query.
  """
  reference = theirs('ttt.naive', 'chunk_ttt_linear_ref')
  length, rate = 40, 0.1
  arrays = heads(length, v=(H,)) | draw(w=(N, H), b=(N, H), start=(N, H, H))
  del arrays['q']
  arrays['w'] = 1 + 0.1 * arrays['w']
  arrays['start'] *= 0.3

  def ours(k, v, w, b, start):
    rates = jnp.full(k.shape[:3], rate)
    model = dict(weights=((start, jnp.zeros((N, H))),), norm=(w, b))
    _, state = fast_weights(k, k, v, rates, **model, chunk_size=CHUNK)
    weight, bias = state.weights[0]
    return jnp.concatenate([weight, bias[:, :, None]], 2)

  def run(k, v, w, b, start):
    _, weight, bias = reference(
      k.clone(),  # queries, which it scales in place
      k,
      v,
      w,
      b,
      eta=rate,
      scale=1.0,
      eps=1e-6,
      mini_batch_size=CHUNK,
      initial_state=start.expand(B, -1, -1, -1),
      output_final_state=True,
    )
    return torch.cat([weight, bias], 2)

  return Case(ours, run, arrays)


CASES = {
  f.__name__: f for f in (comba, fox, hgrn, log_linear, nsa, rwkv7, ttt_linear)
}
