"""Training in bfloat16 states the precision of every product of a model.

As `tests/layers/precision_test.py` asks of every mixer.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import models
from efficient_attn.models.spec import KINDS
from efficient_attn.train.objectives import OBJECTIVES
from tests.precision import faults

B, T, VOCAB = 2, 8, 16
TOKENS = jax.ShapeDtypeStruct((B, T), jnp.int32)
WEIGHTS = jax.ShapeDtypeStruct((B, T), jnp.float32)
ROWS = dict(tokens=TOKENS, segment_ids=TOKENS, positions=TOKENS)
ANSWERS = dict(tokens=TOKENS, labels=TOKENS, weights=WEIGHTS)
BATCHES = {
  'next_token': ROWS,
  'answers': ANSWERS,
  'every_answer': ANSWERS,
  'masked_tokens': ROWS | ANSWERS,
  'target_tokens': dict(
    inputs=TOKENS,
    input_segment_ids=TOKENS,
    targets=TOKENS,
    target_segment_ids=TOKENS,
  ),
  'classification': dict(
    tokens=TOKENS,
    segment_ids=TOKENS,
    label=jax.ShapeDtypeStruct((B,), jnp.int32),
    weight=jax.ShapeDtypeStruct((B,), jnp.float32),
  ),
}
IMAGE = jax.ShapeDtypeStruct((B, 8, 8, 1), jnp.float32)
CASES = [
  (kind, objective, {})
  for kind, row in KINDS.items()
  for objective in row.objectives.values()
] + [
  ('lm', 'next_token', dict(remat='all_dots', tie_embeddings=False)),
  ('lm', 'next_token', dict(ffn='moe', ffns=dict(
    moe=dict(bias=True, shared_dim=8, shared_gate=True)
  ))),
  ('lm', 'next_token', dict(pattern=('attention', 'attention:shared'), mixers={
    'attention:shared': dict(shared_kv=True)
  })),
]  # fmt: skip


@pytest.mark.parametrize('kind,objective,options', CASES)
def test_every_product_states_its_precision(kind, objective, options):
  batch = BATCHES[objective]
  if kind == 'vit':
    options = dict(image_size=8, patch_size=4, channels=1)
    batch = {k: batch[k] for k in ('label', 'weight')} | dict(image=IMAGE)
  elif kind != 'auto_encoder':
    options = dict(vocab_size=VOCAB) | options
  config = configs.resolve(
    dict(
      model=dict(
        name=kind,
        d_model=8,
        num_heads=2,
        num_layers=2,
        dtype='bfloat16',
        **options,
      ),
      data=dict(name='mqar') if 'answer' in objective else {},
    )
  )
  graphdef, params = nnx.split(models.abstract(config.model))
  run = OBJECTIVES[objective](config, None)

  def loss(params, batch):
    return run(nnx.merge(graphdef, params), batch, key=None)['objective']

  wrong = faults(jax.grad(loss), params, batch)
  assert not wrong, '\n'.join([f'{kind}, {objective}:', *sorted(wrong)])
