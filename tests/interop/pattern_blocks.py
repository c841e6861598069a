"""The weights of sparse and biased attention of transformers, by our names.

Imported after `pytest.importorskip('torch')`. Each block is of a length, and a
decoder's cache, where there is one, is theirs.
"""

import math

import jax.numpy as jnp
import numpy as np
import torch
from transformers import DynamicCache

from efficient_attn.layers.context import Context
from efficient_attn.ops import masks, scores
from efficient_attn.ops.softmax.attention import attention
from tests.interop.pairs import D, N, Pair, build, put, randomize

H = D // N


def without_biases(module, **centers):
  """Draws the weights; the projections of ours have no biases."""
  w = randomize(module, **centers)
  for name, p in module.named_parameters():
    if name.endswith('.bias'):
      p.data.zero_()
  return w


def put_heads(qkv, query, key, value, scale=1.0):
  """Sets projections to heads from torch's [outputs, inputs]."""
  put(qkv.query.weight, scale * query.T)
  put(qkv.key.weight, key.T)
  put(qkv.value.weight, value.T)


def longformer_pair(ours, window, num_global, own=True, gap=1) -> Pair:
  """A window and global tokens first, with projections of their `own`.

  Theirs sees every token `gap` places from the next, masked ones between.
  """
  from transformers.models.longformer import modeling_longformer as hf

  config = hf.LongformerConfig(
    hidden_size=D,
    num_attention_heads=N,
    num_hidden_layers=1,
    attention_window=[window],
    attention_probs_dropout_prob=0.0,
  )
  theirs = hf.LongformerSelfAttention(config, layer_id=0).eval()
  w = without_biases(theirs)
  names = 'query', 'key', 'value'
  put_heads(ours.qkv, *(w[f'{name}.weight'] for name in names))
  for name in names:
    if own:
      projection = getattr(ours.global_qkv, name)
      put(projection.weight, w[f'{name}_global.weight'].T)
    else:
      shared = getattr(theirs, name)
      setattr(theirs, f'{name}_global', shared)
  put(ours.out.weight, np.eye(D, dtype=np.float32))  # theirs ends at the heads

  def run(x, cache=None):
    x = torch.nn.functional.pad(x[:, :, None], (0, 0, 0, gap - 1)).flatten(1, 2)
    ends = torch.full(x.shape[:2], -10_000.0)
    ends[:, ::gap] = 0.0
    ends[:, : num_global * gap : gap] = 10_000.0
    y, *_ = theirs(
      x,
      attention_mask=ends,
      is_index_masked=ends < 0,
      is_index_global_attn=ends > 0,
      is_global_attn=num_global > 0,
    )
    return y[:, ::gap]

  return Pair(ours, run, dict)


ENCODER = dict(causal=False, position='none')


def longformer(length) -> Pair:
  options = dict(window=8, num_global=2, global_projections=True)
  return longformer_pair(build('longformer', **options, **ENCODER), 8, 2)


def star(length) -> Pair:
  """A window of neighbours, too small for theirs alone, and a global relay."""
  return longformer_pair(build('star', **ENCODER), 4, 1, own=False, gap=2)


def cascade(length) -> Pair:
  """A window of 5 to each side, that of a second level."""
  ours = build('cascade', base=3, factor=2, level=1, **ENCODER)
  return longformer_pair(ours, 10, 0, own=False)


def bigbird(length) -> Pair:
  """BigBird-ITC in blocks of 4, with the random blocks of ours."""
  from transformers.models.big_bird import modeling_big_bird as hf

  size, count = 4, 2
  config = hf.BigBirdConfig(
    hidden_size=D,
    num_attention_heads=N,
    num_hidden_layers=1,
    block_size=size,
    num_random_blocks=count,
    max_position_embeddings=length,
    use_bias=False,
  )
  theirs = hf.BigBirdBlockSparseAttention(config, seed=0).eval()
  w = randomize(theirs)
  ours = build(
    'bigbird', block_size=size, num_random=count, causal=False, position='none'
  )
  put_heads(ours.qkv, *(w[f'{n}.weight'] for n in ('query', 'key', 'value')))
  put(ours.out.weight, np.eye(D, dtype=np.float32))
  layout = masks.random_blocks(length // size, count, seed=0, causal=False)
  drawn = np.stack([np.flatnonzero(row) for row in layout[1:-1]])
  # Without training theirs draws nothing, and counts the first block twice.
  theirs._bigbird_block_rand_mask_with_head = lambda **_: [drawn] * N

  def run(x, cache=None):
    ones = torch.ones(x.shape[:2])
    band, *rest = hf.BigBirdModel.create_masks_for_block_sparse_attn(ones, size)
    blocked, band, start, stop = band, *rest
    return theirs(x, band, start, stop, blocked, blocked)[0]

  return Pair(ours, run, dict)


def t5(length, causal=False) -> Pair:
  """Relative bias in buckets; their products are not scaled."""
  from transformers.models.t5 import modeling_t5 as hf

  config = hf.T5Config(
    d_model=D,
    num_heads=N,
    d_kv=H,
    num_layers=1,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=20,
    dropout_rate=0.0,
    is_decoder=causal,
    attn_implementation='eager',
  )
  theirs = hf.T5Attention(config, True, layer_idx=0).eval()
  w = randomize(theirs)
  ours = build(
    'attention', position='t5', t5=dict(buckets=12, distance=20), causal=causal
  )
  q, k, v = (w[f'{name}.weight'] for name in 'qkv')
  put_heads(ours.qkv, q, k, v, scale=math.sqrt(H))
  put(ours.out.weight, w['o.weight'].T)
  put(ours.buckets, w['relative_attention_bias.weight'])

  def run(x, cache=None):
    mask = None
    if causal:
      mask = causal_mask(x, cache)
    return theirs(x, mask=mask, past_key_values=cache)[0]

  return Pair(ours, run, DynamicCache)


def t5_decoder(length) -> Pair:
  return t5(length, causal=True)


def causal_mask(x, cache, window=10**6):
  """[1, 1, T, S], 0 where a key is seen."""
  past = cache.get_seq_length() if cache is not None else 0
  rows = past + torch.arange(x.shape[1])[:, None]
  keys = torch.arange(past + x.shape[1])
  seen = (keys <= rows) & (keys > rows - window)
  return torch.where(seen, 0.0, -torch.inf)[None, None]


def bloom(length) -> Pair:
  """ALiBi; theirs counts from the first key, which a softmax cannot tell."""
  from transformers.models.bloom import modeling_bloom as hf

  config = hf.BloomConfig(
    hidden_size=D,
    n_head=N,
    n_layer=1,
    hidden_dropout=0.0,
    attention_dropout=0.0,
  )
  theirs = hf.BloomAttention(config, layer_idx=0).eval()
  w = without_biases(theirs)
  ours = build('attention', position='alibi')
  q, k, v = w['query_key_value.weight'].reshape(N, 3, H, D).swapaxes(0, 1)
  put_heads(ours.qkv, *(a.reshape(D, D) for a in (q, k, v)))
  put(ours.out.weight, w['dense.weight'].T)

  def run(x, cache=None):
    mask = causal_mask(x, cache)
    ones = torch.ones(x.shape[0], mask.shape[-1])
    alibi = hf.build_alibi_tensor(ones, N, torch.float32)
    return theirs(x, torch.zeros_like(x), alibi, mask, layer_past=cache)[0]

  return Pair(ours, run, DynamicCache)


def gemma2(length) -> Pair:
  """A soft cap within a window, of grouped and rotated heads."""
  from transformers.models.gemma2 import modeling_gemma2 as hf

  window, kv_heads = 7, 2
  config = hf.Gemma2Config(
    hidden_size=D,
    num_hidden_layers=1,
    num_attention_heads=N,
    num_key_value_heads=kv_heads,
    head_dim=H,
    query_pre_attn_scalar=H,
    sliding_window=window,
    attn_logit_softcapping=1.5,
    layer_types=['sliding_attention'],
    rope_parameters=dict(rope_type='default', rope_theta=10_000.0),
    attn_implementation='eager',
  )
  theirs = hf.Gemma2Attention(config, layer_idx=0).eval()
  w = randomize(theirs)
  ours = build(
    'window', window=window, num_kv_heads=kv_heads, logits_soft_cap=1.5
  )
  put_heads(ours.qkv, *(w[f'{name}_proj.weight'] for name in 'qkv'))
  put(ours.out.weight, w['o_proj.weight'].T)
  rotary = hf.Gemma2RotaryEmbedding(config)

  def run(x, cache=None):
    past = cache.get_seq_length() if cache is not None else 0
    positions = past + torch.arange(x.shape[1])[None]
    return theirs(
      x,
      position_embeddings=rotary(x, positions),
      attention_mask=causal_mask(x, cache, window),
      past_key_values=cache,
    )[0]

  return Pair(ours, run, DynamicCache)


def swin2(length) -> Pair:
  """Cosine attention and a relative bias in a window of 4 x 9 places.

  The table of the bias is made by a network of theirs, and is a table here.
  """
  from transformers.models.swinv2 import modeling_swinv2 as hf

  grid = (4, length // 4)
  config = hf.Swinv2Config(qkv_bias=False, attention_probs_dropout_prob=0.0)
  theirs = hf.Swinv2SelfAttention(config, D, N, grid).eval()
  w = randomize(theirs, logit_scale=math.log(10.0))
  with torch.no_grad():
    network = theirs.continuous_position_bias_mlp
    table = 16 * torch.sigmoid(network(theirs.relative_coords_table))
  bias = scores.Swin(jnp.asarray(table.reshape(-1, N).numpy()), grid)
  ours = build('attention', cosine=True, position='none', causal=False)
  put_heads(ours.qkv, *(w[f'{n}.weight'] for n in ('query', 'key', 'value')))
  put(ours.out.weight, np.eye(D, dtype=np.float32))
  put(ours.query_norm.log_scale, w['logit_scale'])

  def run(x, cache=None):
    heads = ours.project(x, Context(), None)
    o = attention(*heads, bias=bias, scale=1.0)
    return ours.output(o, x), None

  return Pair(run, lambda x, cache=None: theirs(x)[0], dict)


BLOCKS = {
  f.__name__: f
  for f in (
    bigbird,
    bloom,
    cascade,
    gemma2,
    longformer,
    star,
    swin2,
    t5,
    t5_decoder,
  )
}
