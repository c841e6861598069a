"""What chooses keys, against Hugging Face transformers on CPU.

Independent code with the same weights: the extra `oracle` installs it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.layers.norm import l2_normalize
from efficient_attn.ops.routed.lsh_attention import (
  lsh_buckets,
  sorted_chunk_attention,
)

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

B, T, D, N = 2, 48, 32, 4
CHUNK, ROUNDS = 6, 3


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, T, D)).astype(np.float32)


def close(x, y, tolerance):
  x, y = np.asarray(x), np.asarray(y)
  assert x.shape == y.shape and np.abs(y).max() > 1e-3
  assert np.abs(x - y).max() < tolerance * np.abs(y).max()


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('factors', [(8,), (2, 4)])
def test_reformer(causal, factors):
  """The published chunks, with the same rotations; and the gradients.

  In float64: their logit -1e5 of a token and itself has errors of 0.008.
  """
  from transformers import ReformerConfig
  from transformers.models.reformer.modeling_reformer import LSHSelfAttention

  config = ReformerConfig(
    hidden_size=D,
    num_attention_heads=N,
    attention_head_size=D // N,
    lsh_attn_chunk_length=CHUNK,
    num_hashes=ROUNDS,
    num_buckets=list(factors),
    hash_seed=3,
    is_decoder=causal,
    lsh_attention_probs_dropout_prob=0.0,
  )
  theirs = LSHSelfAttention(config, layer_idx=0).eval().double()
  torch.manual_seed(0)
  for p in theirs.parameters():
    p.data = torch.randn(p.shape, dtype=p.dtype) / D**0.5
  torch.manual_seed(3)
  widths = [factor // 2 for factor in factors]
  shape = N, D // N, ROUNDS, sum(widths)
  rotations = torch.randn(shape, dtype=torch.float64).numpy()
  rotations = np.split(
    rotations.swapaxes(1, 2), np.cumsum(widths)[:-1], axis=-1
  )
  x, weight = (inputs(seed).astype(np.float64) for seed in (0, 1))

  hidden = torch.from_numpy(x).requires_grad_()
  found = theirs(hidden)
  torch.sum(found.hidden_states * torch.from_numpy(weight)).backward()
  weights = [p.detach().numpy().T for p in theirs.parameters()]

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def grad(x):
    query, value = ((x @ w).reshape(B, T, N, D // N) for w in weights)
    buckets = lsh_buckets(query, list(map(jnp.asarray, rotations)))
    y = sorted_chunk_attention(
      query,
      l2_normalize(query),
      value,
      buckets,
      num_buckets=8,
      chunk_size=CHUNK,
      causal=causal,
    ).reshape(B, T, D)
    return jnp.sum(y * weight), (y, buckets)

  with jax.enable_x64(True):
    gradient, (y, buckets) = grad(x)
  # Theirs are [B, N, R T], where round r counts from 8 r.
  expected = found.buckets.reshape(B, N, ROUNDS, T).numpy()
  expected = expected - 8 * np.arange(ROUNDS)[:, None]
  np.testing.assert_array_equal(buckets, expected.transpose(0, 3, 1, 2))
  close(y, found.hidden_states.detach(), 1e-5)
  close(gradient, hidden.grad, 1e-4)


def test_lightning_indexer():
  """DeepSeek-V3.2 chooses the same tokens, and attends to them alone."""
  from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf

  from tests.interop.pairs import build, put

  heads, dim, top_k = 8, 16, 7
  config = hf.DeepseekV32Config(
    hidden_size=D,
    q_lora_rank=D,
    index_n_heads=heads,
    index_head_dim=dim,
    index_topk=top_k,
    qk_rope_head_dim=dim // 2,
  )
  theirs = hf.DeepseekV32Indexer(config, layer_idx=0)
  torch.manual_seed(0)
  for p in theirs.parameters():
    p.data = torch.randn(p.shape) / D**0.5
  ours = build(
    'dsa',
    causal=True,
    position='none',
    top_k=top_k,
    index_heads=heads,
    index_dim=dim,
  )
  w = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
  put(ours.index_query.weight, w['wq_b.weight'].T)
  put(ours.index_key.weight, w['wk.weight'].T)
  put(ours.index_weight.weight, w['weights_proj.weight'].T)
  put(ours.index_norm.scale, w['k_norm.weight'])
  put(ours.index_norm.bias, w['k_norm.bias'])
  rng = np.random.default_rng(0)
  # The attention itself is not theirs.
  qkv = ours.qkv.query, ours.qkv.key, ours.qkv.value
  matrices = [rng.standard_normal((D, D)).astype(np.float32) for _ in qkv]
  for projection, matrix in zip(qkv, matrices, strict=True):
    put(projection.weight, matrix / D**0.5)
  put(ours.out.weight, np.eye(D, dtype=np.float32))

  x = inputs()
  angle = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(dim // 4) * 4 / dim)
  angle = torch.from_numpy(np.tile(angle, 2)[None].astype(np.float32))
  hidden = torch.from_numpy(x)
  mask = torch.ones(T, T, dtype=bool).tril()[None]
  with torch.no_grad():
    chosen = theirs(
      hidden, hidden, (angle.cos(), angle.sin()), mask, position_ids=None
    )
    seen = torch.zeros(B, T, T, dtype=bool)
    seen = seen.scatter(-1, chosen.long(), True) & mask
    expected = torch.nn.functional.scaled_dot_product_attention(
      *(
        (hidden @ torch.from_numpy(m) / D**0.5)
        .view(B, T, N, -1)
        .transpose(1, 2)
        for m in matrices
      ),
      attn_mask=seen[:, None],
    )
  y, _ = jax.jit(ours)(x)
  close(y, expected.transpose(1, 2).reshape(B, T, D), 1e-5)
