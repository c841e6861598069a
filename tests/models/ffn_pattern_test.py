"""Ffns by layer: a pattern beside that of the mixers, and first layers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig, resolve
from efficient_attn.layers.layout import restack, unstack
from efficient_attn.train.check import complete
from tests.layers.built import filled

B, T, VOCAB = 2, 6, 32
BASE = dict(
  d_model=16,
  num_heads=2,
  num_layers=8,
  vocab_size=VOCAB,
  pattern=('gla', 'attention'),
  mixers={'gla': {'chunk_size': 4}},
  ffn_pattern=('glu', 'glu:wide', 'none'),
  first_ffns=('mlp',),
  ffns={
    'glu:wide': {'ffn_dim': 96, 'limit': 1.0, 'offset': 1.0},
    'mlp': {'bias': True, 'activation': 'relu2'},
  },
  ffn_dim=24,
)
TOKENS = jnp.arange(B * T).reshape(B, T) % VOCAB
PATTERN = ('glu', 'glu:wide', 'none')


def build(**changes):
  config = LMConfig(**BASE | changes)
  return filled(lambda: models.build(config, rngs=nnx.Rngs(0)))


def flat(model):
  return {
    '.'.join(map(str, path)): p[...]
    for path, p in nnx.to_flat_state(nnx.state(model))
  }


def width(block):
  return block.ffn and block.ffn.up.weight.shape[-1]


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('num_layers', [8, 16])
def test_each_layer_has_its_mixer_and_ffn(scan_layers, num_layers):
  model = build(scan_layers=scan_layers, num_layers=num_layers)
  layers = list(model.stack.layers())
  assert model.stack.scan == (scan_layers and num_layers == 16)
  widths = {'mlp': 24, 'glu': 24, 'glu:wide': 96, 'none': None}
  names = ['mlp', *(PATTERN[i % 3] for i in range(1, num_layers))]
  assert [width(b) for b in layers] == [widths[name] for name in names]
  mixers = [BASE['pattern'][i % 2] for i in range(num_layers)]
  assert [b.name for b in layers] == mixers


@pytest.mark.in_turn
def test_scanned_unrolled_and_cached_agree():
  scanned = build(num_layers=14)  # one, twice six, one
  unrolled = build(num_layers=14, scan_layers=False)
  single = unstack(flat(scanned))
  assert 'stack.layers.0.ffn.up.bias' in single
  assert 'stack.layers.13.mixer.out.weight' in single
  params = restack(single, like=flat(unrolled))
  graphdef, state = nnx.split(unrolled)
  state = nnx.from_flat_state(
    [
      (path, p.replace(params['.'.join(map(str, path))]))
      for path, p in nnx.to_flat_state(state)
    ]
  )
  unrolled = nnx.merge(graphdef, state)
  whole, _ = jax.jit(lambda m: m(TOKENS))(scanned)
  other, _ = jax.jit(lambda m: m(TOKENS))(unrolled)
  np.testing.assert_allclose(whole, other, atol=1e-5)
  cache, found = scanned.init_cache(B, T), []
  for a, b in itertools.pairwise((0, 4, T)):
    logits, cache = scanned(TOKENS[:, a:b], cache=cache)
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-4)
  back = restack(unstack(flat(unrolled)), like=flat(scanned))
  for name, x in flat(scanned).items():
    np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_dropout_of_the_first_layers_has_keys_of_its_own():
  model = build(num_layers=2, dropout=0.5)
  keys = jax.random.split(jax.random.key(0))
  one, again, other = (
    model(TOKENS, key=key)[0] for key in (keys[0], keys[0], keys[1])
  )
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


def test_a_run_records_the_options_of_its_ffns():
  config = complete(resolve(dict(model=BASE | {'name': 'lm'})))
  plain = dict(gate_scale=1.0, limit=0.0, offset=0.0)
  assert config.model.ffns['glu'] == plain
  assert config.model.ffns['glu:wide'] == plain | dict(
    ffn_dim=96, limit=1.0, offset=1.0
  )
  assert config.model.ffns['mlp'] == dict(bias=True, activation='relu2')


@pytest.mark.parametrize(
  'changes,message',
  [
    (dict(ffn='gul'), "model.ffn='gul' is unknown; did you mean 'glu'"),
    (dict(ffn_pattern=('gul',)), "model.ffn_pattern='gul'.* 'glu'"),
    (dict(first_ffns=('gul',)), "model.first_ffns='gul'.* 'glu'"),
    (dict(ffns={'gul': {}}), "model.ffns='gul'.* 'glu'"),
    (dict(ffns={'glu': {'dim': 2}}), 'model.ffns.glu.dim=2 is not an option'),
    (dict(ffns={'none': {'bias': True}}), "'none' has no options"),
    (
      dict(ffns={'glu': {'activation': 'silo'}}),
      "model.ffns.glu.activation='silo' is unknown; did you mean 'silu'",
    ),
    (dict(num_layers=1, first_ffns=('glu', 'glu')), 'more than .*num_layers=1'),
  ],
)
def test_wrong_configurations(changes, message):
  changes = dict(ffn_pattern=(), first_ffns=(), ffns={}) | changes
  with pytest.raises(ConfigError, match=message):
    models.abstract(LMConfig(**BASE | changes))
