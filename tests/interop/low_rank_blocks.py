"""Our low-rank mixers and blocks of transformers with the same weights.

Imported after `pytest.importorskip('torch')`. Where the two differ by choice
the weights or a part put aside make the difference vanish, and say so.
"""

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.cross_attention import CrossAttention
from tests.interop.pairs import D, N, Pair, build, into, put, randomize

H = D // N


def no_biases(*modules) -> None:
  """Ours have none in projections."""
  for module in modules:
    if isinstance(module, torch.nn.Linear) and module.bias is not None:
      module.bias.data.zero_()


def put_qkv(qkv, *weights) -> None:
  for projection, weight in zip(
    (qkv.query, qkv.key, qkv.value), weights, strict=True
  ):
    put(projection.weight, into(weight))


def put_cross(ours: CrossAttention, q, k, v, out) -> None:
  for projection, weight in (
    (ours.query, q),
    (ours.key, k),
    (ours.value, v),
    (ours.out, out),
  ):
    put(projection.weight, into(weight))


def put_norm(norm, weights, name) -> None:
  put(norm.scale, weights[f'{name}.weight'])
  put(norm.bias, weights[f'{name}.bias'])


def pair(ours, theirs) -> Pair:
  return Pair(ours, theirs, lambda: None)


def nystrom(length: int) -> Pair:
  """Theirs has no output projection; its `exact` start is the paper's."""
  from transformers.models.nystromformer import modeling_nystromformer as hf

  config = hf.NystromformerConfig(
    hidden_size=D,
    num_attention_heads=N,
    num_landmarks=length // 4,
    segment_means_seq_len=length,
    conv_kernel_size=5,
  )
  theirs = hf.NystromformerSelfAttention(config).eval()
  theirs.init_option = 'exact'
  w = randomize(theirs)
  no_biases(*theirs.modules())
  ours = build(
    'nystrom', causal=False, num_landmarks=length // 4, residual_width=5
  )
  put_qkv(ours.qkv, *(w[f'{x}.weight'] for x in ('query', 'key', 'value')))
  put(ours.taps, w['conv.weight'][:, 0, :, 0].T)
  put(ours.out.weight, np.eye(D, dtype=np.float32))
  return pair(ours, lambda x: theirs(x)[0])


def fnet(length: int) -> Pair:
  from transformers.models.fnet import modeling_fnet as hf

  theirs = hf.FNetBasicFourierTransform(hf.FNetConfig(hidden_size=D))
  return pair(build('fnet', causal=False), lambda x: theirs(x)[0])


def xlnet_weights():
  from transformers.models.xlnet import modeling_xlnet as hf

  config = hf.XLNetConfig(d_model=D, n_head=N, n_layer=1, vocab_size=8)
  theirs = hf.XLNetRelativeAttention(config).eval()
  w = randomize(theirs)
  theirs.layer_norm = torch.nn.Identity()
  model = hf.XLNetModel(config)
  ours = build('transformer_xl', mem_len=64)
  put_qkv(ours.qkv, *(np.moveaxis(w[x], 0, -1) for x in 'qkv'))
  put(ours.out.weight, np.moveaxis(w['o'], 0, -1))
  put(ours.relative.weight, w['r'])
  put(ours.relative.content_bias, w['r_w_bias'])
  put(ours.relative.position_bias, w['r_r_bias'])
  return ours, theirs, model


def transformer_xl(length: int) -> Pair:
  """XLNet's attention with a causal mask; its norm and residual put aside.

  Its memory is of hidden states, ours of their keys and values.
  """
  ours, theirs, model = xlnet_weights()

  def run(x, memory=None):
    past = 0 if memory is None or not memory else memory[0].shape[0]
    new = x.shape[1]
    positions = model.relative_positional_encoding(
      new, past + new, bsz=x.shape[0]
    )
    mask = torch.ones(new, past + new).triu(1 + past)[..., None, None]
    h = x.swapaxes(0, 1)
    y, _ = theirs(
      h,
      None,
      attn_mask_h=mask,
      attn_mask_g=None,
      r=positions,
      seg_mat=None,
      mems=memory[0] if past else None,
    )
    if memory is not None:
      memory[:] = [torch.cat([*memory, h])]
    return (y - h).swapaxes(0, 1)

  return Pair(ours, run, list)


def funnel_weights():
  from transformers.models.funnel import modeling_funnel as hf

  config = hf.FunnelConfig(
    d_model=D,
    n_head=N,
    d_head=H,
    separate_cls=False,
    attention_type='relative_shift',
  )
  theirs = hf.FunnelRelMultiheadAttention(config, 0).eval()
  w = randomize(theirs)
  theirs.layer_norm = torch.nn.Identity()
  no_biases(*theirs.modules())
  return hf, config, theirs, w


def funnel(length: int) -> Pair:
  """Theirs without its relative positions, norm and residual connection."""
  hf, config, theirs, w = funnel_weights()
  for name in ('r_kernel', 'r_w_bias'):
    getattr(theirs, name).data.zero_()
  structure = hf.FunnelAttentionStructure(config).eval()
  ours = build('funnel', causal=False, pool_size=2, position='none')
  put_qkv(ours.qkv, *(w[f'{x}_head.weight'] for x in 'qkv'))
  put(ours.out.weight, into(w['post_proj.weight']))

  def run(x):
    # Any positions: they are multiplied by zero.
    places = structure.init_attention_inputs(x)
    pooled = structure.pool_tensor(x)
    places[0][0][1] = torch.zeros(2 * pooled.shape[1] + x.shape[1] - 1, D)
    (y,) = theirs(pooled, x, x, places)
    return hf.upsample(
      y - pooled, stride=2, target_len=x.shape[1], separate_cls=False
    )

  return pair(ours, run)


def funnel_positions(length: int) -> Pair:
  """What Funnel does before it pools: Transformer-XL in both directions."""
  hf, config, theirs, w = funnel_weights()
  structure = hf.FunnelAttentionStructure(config).eval()
  ours = build('transformer_xl', causal=False)
  put_qkv(ours.qkv, *(w[f'{x}_head.weight'] for x in 'qkv'))
  put(ours.out.weight, into(w['post_proj.weight']))
  put(ours.relative.weight, w['r_kernel'])
  put(ours.relative.content_bias, w['r_w_bias'])
  put(ours.relative.position_bias, w['r_r_bias'])

  def run(x):
    (y,) = theirs(x, x, x, structure.init_attention_inputs(x))
    return y - x

  return pair(ours, run)


def perceiver(length: int) -> Pair:
  """A layer that reads the tokens, one of latents, and what a decoder reads.

  Tokens come normalised to ours, so theirs does not normalise them again. The
  decoder's MLP is the block's.
  """
  from transformers.models.perceiver import modeling_perceiver as hf

  config = hf.PerceiverConfig()
  sizes = dict(num_heads=N, q_dim=D, kv_dim=D)
  layers = [
    hf.PerceiverLayer(config, cross, widening_factor=1, **sizes)
    for cross in (True, False)
  ]
  read = hf.PerceiverAttention(config, True, use_query_residual=False, **sizes)
  ours = build('perceiver', causal=False, num_latents=5, num_layers=1)
  generator = torch.Generator().manual_seed(3)
  latents = torch.randn(1, 5, D, generator=generator)
  put(ours.latents, latents.numpy())

  def put_attention(mine, w, prefix):
    names = ('self.query', 'self.key', 'self.value', 'output.dense')
    put_cross(mine, *(w[f'{prefix}{name}.weight'] for name in names))

  for mine, layer in zip(ours.layers, layers, strict=True):
    norms = {'layernorm': 1.0, 'attention.self.layernorm': 1.0}
    w = randomize(layer.eval(), **norms)
    no_biases(*layer.modules())
    put_attention(mine.attention, w, 'attention.')
    put_norm(mine.norm, w, 'attention.self.layernorm1')
    put_norm(mine.mlp_norm, w, 'layernorm')
    put(mine.mlp.up.weight, into(w['mlp.dense1.weight']))
    put(mine.mlp.down.weight, into(w['mlp.dense2.weight']))
  w = randomize(read.eval(), **{'self.layernorm': 1.0})
  no_biases(*read.modules())
  put_attention(ours.read, w, '')
  put_norm(ours.norm, w, 'self.layernorm2')
  layers[0].attention.self.layernorm2 = torch.nn.Identity()
  read.self.layernorm1 = torch.nn.Identity()

  def run(x):
    (z,) = layers[0](latents.expand(len(x), -1, -1), inputs=x)
    (z,) = layers[1](z)
    return read(x, inputs=z)[0]

  return pair(ours, run)


def cross_attention(ours_query_scale, theirs, w, names):
  ours = nnx.eval_shape(lambda: CrossAttention(D, N, rngs=nnx.Rngs(0)))
  q, k, v, out = (w[f'{name}.weight'] for name in names)
  put_cross(ours, ours_query_scale * q, k, v, out)
  generator = torch.Generator().manual_seed(3)
  context = torch.randn(2, 11, D, generator=generator)

  def run(x, **kwargs):
    memory = jnp.asarray(context.numpy()[: x.shape[0]])
    return ours(x, Context(memory=memory))

  return pair(run, lambda x: theirs(x, context[: x.shape[0]]))


def t5(length: int) -> Pair:
  """Theirs does not scale the products: our queries are larger instead."""
  from transformers.models.t5 import modeling_t5 as hf

  config = hf.T5Config(d_model=D, num_heads=N, d_kv=H)
  theirs = hf.T5Attention(config).eval()
  w = randomize(theirs)
  return cross_attention(
    H**0.5, lambda x, c: theirs(x, key_value_states=c)[0], w, 'qkvo'
  )


def led(length: int) -> Pair:
  from transformers.models.led import modeling_led as hf

  theirs = hf.LEDDecoderAttention(D, N).eval()
  w = randomize(theirs)
  names = ('q_proj', 'k_proj', 'v_proj', 'out_proj')
  no_biases(*theirs.modules())
  return cross_attention(
    1.0, lambda x, c: theirs(x, key_value_states=c)[0], w, names
  )


BLOCKS = {
  'fnet': fnet,
  'funnel': funnel,
  'funnel_positions': funnel_positions,
  'led': led,
  'nystrom': nystrom,
  'perceiver': perceiver,
  't5': t5,
  'transformer_xl': transformer_xl,
}
