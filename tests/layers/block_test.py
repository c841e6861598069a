"""Residual forms of a block, each written out with its own parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import models
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.layers.block import Block
from efficient_attn.layers.context import Context
from tests.layers.built import filled

B, T, D, VOCAB = 2, 6, 16, 32
BASE = dict(
  d_model=D,
  num_heads=2,
  num_layers=3,
  vocab_size=VOCAB,
  pattern=('gla', 'attention'),
  mixers={'gla': {'chunk_size': 4}},
)
X = jax.random.normal(jax.random.key(1), (B, T, D))
SKIP, BRANCH, SMALL = 3.5, 0.5, 0.25
FACTORS = {
  'attention': dict(skip=SKIP, branch=BRANCH),
  'glu': dict(branch=SMALL),
}


def parts(block):
  """The mixer, the ffn and the norms, as functions."""
  return (
    lambda x: block.mixer(x)[0],
    block.ffn,
    block.mixer_norm,
    block.ffn_norm,
  )


def pre(b, x):
  f, g, m, n = parts(b)
  x = x + f(m(x))
  return x + g(n(x))


def post(b, x):
  f, g, m, n = parts(b)
  x = m(x + f(x))
  return n(x + g(x))


def sandwich(b, x):
  f, g, m, n = parts(b)
  x = x + b.mixer_post_norm(f(m(x)))
  return x + b.ffn_post_norm(g(n(x)))


def branch(b, x):
  f, g, m, n = parts(b)
  x = x + m(f(x))
  return x + n(g(x))


def normed(b, x):
  f, g, m, n = parts(b)
  x = m(x) + f(m(x))
  return n(x) + g(n(x))


def own_norms(b, x):
  f, g, m, n = parts(b)
  return x + f(m(x)) + g(n(x))


def shared_norm(b, x):
  f, g, m, n = parts(b)
  assert n is None
  return x + f(m(x)) + g(m(x))


def sandwich_in_parallel(b, x):
  f, g, m, n = parts(b)
  return x + b.mixer_post_norm(f(m(x))) + b.ffn_post_norm(g(n(x)))


def branch_in_parallel(b, x):
  f, g, m, n = parts(b)
  return x + m(f(x)) + n(g(x))


def scaled_branches(b, x):
  f, g, m, n = parts(b)
  x = SKIP * x + BRANCH * f(m(x))
  return x + SMALL * g(n(x))


def scaled_normed(b, x):
  f, g, m, n = parts(b)
  x = SKIP * m(x) + BRANCH * f(m(x))
  return n(x) + SMALL * g(n(x))


FORMS = [
  (pre, {}),
  (post, dict(norm_position='post')),
  (sandwich, dict(norm_position='sandwich')),
  (branch, dict(norm_position='branch')),
  (normed, dict(norm_position='normed')),
  (own_norms, dict(parallel='own_norms')),
  (shared_norm, dict(parallel='shared_norm')),
  (
    sandwich_in_parallel,
    dict(parallel='own_norms', norm_position='sandwich'),
  ),
  (branch_in_parallel, dict(parallel='own_norms', norm_position='branch')),
  (scaled_branches, dict(residuals=FACTORS)),
  (scaled_normed, dict(residuals=FACTORS, norm_position='normed')),
]
of_each_form = pytest.mark.parametrize(
  'form,options', FORMS, ids=[form.__name__ for form, _ in FORMS]
)


@of_each_form
def test_a_block_by_its_equation(form, options):
  config = LMConfig(**BASE | dict(num_layers=1) | options)
  block = filled(lambda: Block(config, 'attention', True, rngs=nnx.Rngs(0)))
  y, _, _ = block(X, Context(), None, None, {})
  np.testing.assert_allclose(y, form(block, X), atol=1e-5)


@of_each_form
def test_a_model_decodes_what_it_computes(form, options):
  config = LMConfig(**BASE | options)
  model = filled(lambda: models.build(config, rngs=nnx.Rngs(0)))
  assert (model.norm is None) == (form is post)
  tokens = jnp.arange(B * T).reshape(B, T) % VOCAB
  whole, _ = jax.jit(lambda m, x: m(x))(model, tokens)
  cache, found = model.init_cache(B, T), []
  for a, b in itertools.pairwise((0, 4, T)):
    logits, cache = model(tokens[:, a:b], cache=cache)
    found.append(logits)
  np.testing.assert_allclose(jnp.concatenate(found, 1), whole, atol=1e-4)


@pytest.mark.parametrize(
  'options,message',
  [
    (dict(norm_position='middle'), "norm_position='middle'"),
    (dict(parallel='both'), "parallel='both'"),
    (
      dict(parallel='own_norms', norm_position='post'),
      "parallel='own_norms' .*norm_position='post'; use 'pre' or",
    ),
    (
      dict(parallel='shared_norm', norm_position='branch'),
      "parallel='shared_norm' .*norm_position='branch'",
    ),
    (dict(residuals={'glo': {}}), "model.residuals='glo'.*'glu'"),
    (
      dict(residuals={'glu': {'scale': 2}}),
      'model.residuals.glu.scale=2 is not a known key',
    ),
    (
      dict(residuals={'attention': {'skip': 2.0}}, parallel='own_norms'),
      'model.residuals.attention.skip=2.0',
    ),
  ],
)
def test_forms_that_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    models.abstract(LMConfig(**BASE | options))
