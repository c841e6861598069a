"""Which method for which need: what two guides advise, by what it costs."""

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import models, ops
from efficient_attn.ops import masks
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.claim import (
  FAILS,
  HOLDS,
  RESTATED,
  Claim,
  Statement,
  elsewhere,
)
from experiments.survey.models import (
  SEVEN_B,
  cache_bytes,
  decode_step,
  mixer,
  training_pass,
)
from experiments.survey.recompute import stack

D, HEADS, WINDOW = 512, 8, 4096
LENGTHS = (16_384, 65_536)
SHORT = (512, 1024, 2048, 4096, 8192)
CONTEXT = 131_072
CARD = 80e9  # bytes of an A100 or H100
SIDES = (56, 112)  # patches of 4 pixels, in images of 224 and 448


def tokens(length: int, width: int = D) -> jax.ShapeDtypeStruct:
  """The input of a layer."""
  return jax.ShapeDtypeStruct((1, length, width), jnp.float32)


def peaks() -> list[float]:
  """Peak memory of training a block by dense attention over that in tiles."""
  found = []
  for length in SHORT:
    dense, tiled = (
      training_pass(
        stack(1, mixers={'attention': dict(implementation=name)}),
        tokens(length, 256),
      ).peak_bytes
      for name in ('reference', 'blockwise')
    )
    found.append(dense / tiled)
  return found


def training(layers: int = 16) -> dict[str, float]:
  """Peak memory of training a stack, over float32 with all activations."""
  found = {}
  for dtype in ('float32', 'bfloat16'):
    for remat in ('none', 'full'):
      made = stack(layers, dtype=dtype, remat=remat)
      x = jax.ShapeDtypeStruct((4, 1024, 256), dtype)
      found[f'{dtype} {remat}'] = training_pass(made, x).peak_bytes
  return {k: v / found['float32 none'] for k, v in found.items()}


def general() -> dict[str, float]:
  """Tiles against dense attention: the error, and operations of training."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((3, 1, 512, 2, 64)), jnp.float32)
  wanted = oracles.softmax_attention(*x[:, 0], causal=True)
  out = ops.attention(*x, mask=masks.Causal(), implementation='blockwise')
  dense, tiled = (
    training_pass(
      mixer('attention', D, HEADS, implementation=name), tokens(LENGTHS[0])
    ).operations
    for name in ('reference', 'blockwise')
  )
  return dict(error=largest(out[0], wanted), operations=tiled / dense)


def inference() -> dict[str, float]:
  """Bytes of a cache with 8 of 32 kv heads, and the error of pieces."""
  rng = np.random.default_rng(1)
  q = jnp.asarray(rng.standard_normal((1, 1, 4, 64)), jnp.float32)
  k, v = jnp.asarray(rng.standard_normal((2, 1, 1000, 1, 64)), jnp.float32)
  out, _ = ops.split_attention(q, k, v, num_splits=7)
  whole, grouped = (
    cache_bytes(mixer('attention', 4096, 32, num_kv_heads=heads), CONTEXT)
    for heads in (32, 8)
  )
  wanted = oracles.softmax_attention(q[0], k[0], v[0])
  return dict(pieces=largest(out[0], wanted), cache=grouped / whole)


def long_context() -> dict[str, float]:
  """Bytes of a 7B decoder with 128K tokens, and its FLOPs of a token."""
  weights = 2 * models.parameter_count(SEVEN_B)
  rows = {
    'all heads': mixer('attention', 4096, 32),
    'grouped': mixer('attention', 4096, 32, num_kv_heads=8),
    'window': mixer('window', 4096, 32, window=WINDOW),
  }
  found = {}
  for name, module in rows.items():
    cache = SEVEN_B.num_layers * cache_bytes(module, CONTEXT)
    found[f'{name} gb'] = (weights + cache) / 1e9
    found[f'{name} flops'] = decode_step(module, 4096, CONTEXT).flops
  return found


def streaming() -> dict[str, list[float]]:
  """By row: exponents of the decode state, and of a token's operations."""
  found = {}
  for name in ('mamba2', 'rwkv6', 'rwkv7', 'attention'):
    module = mixer(name, D, HEADS)
    sizes = [cache_bytes(module, n) for n in LENGTHS]
    costs = [decode_step(module, D, n).operations for n in LENGTHS]
    found[name] = [slope(LENGTHS, sizes), slope(LENGTHS, costs)]
  return found


def documents() -> dict[str, float]:
  """By row: the exponent of the operations of training."""
  found = {}
  for name in ('longformer', 'bigbird', 'attention'):
    module = mixer(name, D, HEADS)
    counts = [training_pass(module, tokens(n)) for n in LENGTHS]
    found[name] = slope(LENGTHS, [c.operations for c in counts])
  return found


def images() -> dict[str, float]:
  """Exponents of training in the patches: windows of 7 x 7, and all."""
  sizes = [side**2 for side in SIDES]
  modules = dict(
    windows=mixer('neighborhood', 64, 4, causal=False, window=7),
    whole=mixer('attention', 64, 4, causal=False),
  )

  def operations(module, side):
    x = tokens(side**2, 64)
    return training_pass(module, x, grid=(side, side)).operations

  return {
    name: slope(sizes, [operations(module, side) for side in SIDES])
    for name, module in modules.items()
  }


def measure() -> dict:
  """R49: all of these."""
  return dict(
    peaks=peaks(),
    training=training(),
    general=general(),
    inference=inference(),
    long=long_context(),
    streaming=streaming(),
    documents=documents(),
    images=images(),
  )


def doubling(values) -> float:
  """The length where dense attention takes twice the memory of tiles."""
  logs = np.log(values['peaks']), np.log(SHORT)
  return float(np.exp(np.interp(np.log(2), *logs)))


def shown_doubling(values) -> str:
  """The length, and the ratios."""
  ratios = zip(values['peaks'], SHORT, strict=True)
  every = ', '.join(f'{ratio:.1f}x at {n:,}' for ratio, n in ratios)
  return f'twice the memory at {doubling(values):,.0f} tokens: {every}'


def from_2k(values) -> str:
  """Near 2K; or shorter; or longer, where standard attention was fine."""
  length = doubling(values)
  if length > 4096:
    return FAILS
  return HOLDS if length > 1024 else RESTATED


def both_save(values) -> str:
  """Together they take less than either."""
  found = values['training']
  both = found['bfloat16 full']
  least = min(found['float32 full'], found['bfloat16 none'])
  return HOLDS if both < 0.9 * least and least < 0.9 else FAILS


def shown_training(values) -> str:
  """The memory of each."""
  names = {
    'float32 full': 'checkpoints',
    'bfloat16 none': 'bfloat16',
    'bfloat16 full': 'both',
  }
  found = values['training']
  return ', '.join(f'{said} {found[k]:.0%}' for k, said in names.items())


def flash(values) -> str:
  """Exact, and no more work."""
  found = values['general']
  right = found['error'] < 1e-5 and found['operations'] < 1.3
  return HOLDS if right and values['peaks'][-1] > 2 else FAILS


def shown_flash(values) -> str:
  """Error, work and memory."""
  found = values['general']
  return (
    f'error {found["error"]:.1e}, {found["operations"]:.2f} of the operations, '
    f'1 / {values["peaks"][-1]:.0f} of the memory at {SHORT[-1]:,} tokens'
  )


def grouped(values) -> str:
  """A fraction is read, and pieces are exact."""
  found = values['inference']
  return HOLDS if found['pieces'] < 1e-5 and found['cache'] < 0.5 else FAILS


def shown_grouped(values) -> str:
  """Share of the cache, and the error of pieces."""
  found = values['inference']
  return (
    f'{found["cache"]:.0%} of the cache with 8 of 32 heads, error of 7 pieces '
    f'{found["pieces"]:.1e}'
  )


def fits(values) -> str:
  """Only with groups it fits; a window has a fraction of the work."""
  found = values['long']
  room = found['grouped gb'] < CARD / 1e9 < found['all heads gb']
  fewer = found['window flops'] < 0.25 * found['grouped flops']
  return HOLDS if room and fewer else FAILS


def shown_long(values) -> str:
  """Memory and work."""
  found = values['long']
  return (
    f'{found["all heads gb"]:.0f} GB with all heads, {found["grouped gb"]:.0f} '
    f'with 8; {found["window flops"] / found["grouped flops"]:.0%} of the '
    f'FLOPs of a token with a window of {WINDOW:,}'
  )


def streams(values) -> str:
  """Nothing grows with what came before, as it does in attention."""
  found = values['streaming']
  still = all(
    max(map(abs, powers)) < 0.01
    for name, powers in found.items()
    if name != 'attention'
  )
  return HOLDS if still and min(found['attention']) > 0.5 else FAILS


def shown_streams(values) -> str:
  """Exponents."""
  return ', '.join(
    f'{name} state N^{state:.2f}, operations N^{work:.2f}'
    for name, (state, work) in values['streaming'].items()
  )


def reads_documents(values) -> str:
  """Linear in the length."""
  found = values['documents']
  near = all(abs(found[name] - 1) < 0.1 for name in ('longformer', 'bigbird'))
  return HOLDS if near and found['attention'] > 1.5 else FAILS


def powers(key: str):
  """How exponents are shown."""

  def measured(values):
    found = values[key].items()
    return ', '.join(f'{name} N^{power:.2f}' for name, power in found)

  return measured


def sees_images(values) -> str:
  """Windows grow like the patches, all of attention like their square."""
  found = values['images']
  right = abs(found['windows'] - 1) < 0.3 and abs(found['whole'] - 2) < 0.3
  return HOLDS if right else FAILS


TREE, GUIDE = 'S000 When to Use What?', 'S001 Quick Decision Guide'
R49 = Claim(
  title='Which method for which need',
  tier='b',
  measure=measure,
  seeds=(0, 1),
  statements=(
    Statement(
      says='Sequences of more than 2K tokens need FlashAttention, sparse or '
      'linear attention, shorter ones do not',
      source=TREE,
      printed='>2K tokens',
      measured=shown_doubling,
      judge=from_2k,
      rule='dense attention takes twice the peak memory of tiles in training a '
      'block of width 256 at 1K to 4K tokens; restated if sooner',
    ),
    Statement(
      says='Training with little memory: checkpoints and mixed precision',
      source=TREE,
      printed='Gradient checkpointing + Mixed precision',
      measured=shown_training,
      judge=both_save,
      rule='each takes a tenth or more off the peak of 16 layers in float32, '
      'and both another tenth',
    ),
    Statement(
      says='Images: windows for dense tasks, whole attention to classify',
      source=TREE,
      printed='Swin (dense) or ViT (classification)',
      measured=powers('images'),
      judge=sees_images,
      rule='exponents in the patches of images of 224 and 448 pixels within '
      '0.3 of 1 and of 2, as tiles at the edges of windows are computed whole: '
      'only the cost, of windows of 7 x 7 around each patch',
    ),
    elsewhere(
      'Swin is the better of the two for dense tasks, ViT to classify',
      TREE,
      'Swin (dense) or ViT (classification)',
      'both trained on ImageNet, and tuned for detection, on GPUs',
    ),
    Statement(
      says='For general use: FlashAttention',
      source=GUIDE,
      printed='FlashAttention2/3',
      measured=shown_flash,
      judge=flash,
      rule='exact to 1e-5 of float32, no more than 1.3 of the operations and '
      'less than half of the memory; its time is that of R10',
    ),
    Statement(
      says='For inference of language models: grouped queries and '
      'FlashDecoding',
      source=GUIDE,
      printed='GQA + FlashDecoding',
      measured=shown_grouped,
      judge=grouped,
      rule='less than half of the cache is read, in pieces that are exact to '
      '1e-5 of float32',
    ),
    elsewhere(
      'Grouped queries and FlashDecoding make inference faster',
      GUIDE,
      'GQA + FlashDecoding',
      '`python launch/bench.py --suite=attention` on a GPU',
    ),
    Statement(
      says='For contexts of 128K tokens: grouped queries, sparse attention and '
      'FlashAttention',
      source=GUIDE,
      printed='GQA + Sparse + Flash',
      measured=shown_long,
      judge=fits,
      rule='weights and cache of a 7B decoder fit into 80 GB with 8 kv heads '
      'and not with 32; a window needs a quarter of the FLOPs of a token',
    ),
    Statement(
      says='For streams: Mamba-2 or RWKV',
      source=GUIDE,
      printed='Mamba2 or RWKV',
      measured=shown_streams,
      judge=streams,
      rule='exponents of state and operations below 0.01, and above 0.5 of '
      'attention; what they recall is R21',
    ),
    Statement(
      says='For documents: Longformer or BigBird',
      source=GUIDE,
      printed='Longformer / BigBird',
      measured=powers('documents'),
      judge=reads_documents,
      rule='exponents of training within 0.1 of 1, and above 1.5 of attention',
    ),
  ),
)

DECISIONS = {'R49': R49}
