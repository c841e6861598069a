"""Every product of every mixer in bfloat16 says how precise it is.

A TPU rounds float32 operands to bfloat16 unless told otherwise, and multiplies
two dtypes as float32. Programs are traced, in all the ways that a mixer is
called, and not run.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_attn.layers.context import Context
from efficient_attn.layers.mixers import MIXERS, build_mixer, mixer_options
from tests.layers.mixers_test import CASES, MORE, OPTIONS, grid_of
from tests.precision import faults

B, T, D, N = 2, 24, 32, 4

# They refuse packed rows in an encoder.
PACKED_DECODERS = {'bigbird', 'lact'}

# A layer with `shared_kv` has no keys of its own: tests/models builds those.
# Comba and a decoder's Longformer refuse theirs.
NOT_ALONE = {'shared_kv', 'negative_eigenvalues', 'global_projections'}
FLIPPED = [
  (name, {**options, option: not p.default})
  for name, options in CASES
  for option, p in mixer_options(name).items()
  if p.annotation is bool and option not in NOT_ALONE
]
ALWAYS = [*CASES, *OPTIONS, ('lact', dict(chunk_size=8, muon=True))]


@pytest.mark.parametrize(
  'name,options',
  [
    pytest.param(name, options, id=f'{name}-{sorted(options)}', marks=marks)
    for cases, marks in (
      (ALWAYS, ()),
      (MORE + FLIPPED, (pytest.mark.exhaustive,)),
    )
    for name, options in cases
  ],
)
def test_every_product_states_its_precision(name, options):
  wrong = set()
  for causal in (True, False):
    if MIXERS[name].causal if causal else MIXERS[name].bidirectional:
      wrong |= faults_of(name, options, causal)
  assert not wrong, '\n'.join([f'{name} {options}:', *sorted(wrong)])


def faults_of(name, options, causal):
  if not causal and options.get('conv_width'):
    return set()  # refused: the convolution is causal

  def build():
    return build_mixer(
      name,
      d_model=D,
      num_heads=N,
      causal=causal,
      rngs=nnx.Rngs(0),
      **options,
    )

  graphdef, params = nnx.split(nnx.eval_shape(build))
  mixer = nnx.merge(graphdef, params)
  x, ids = tokens(T), jnp.ones((B, T), jnp.int32)

  def call(params, x, segment_ids=None, cache=None):
    context = Context(segment_ids=segment_ids, grid=grid_of(mixer, x))
    return nnx.merge(graphdef, params)(x, context, cache)

  def train(params, x, segment_ids=None):
    y, pull = jax.vjp(lambda *xs: call(*xs, segment_ids)[0], params, x)
    return pull(y)

  calls = [(call, x), (train, x)]
  if MIXERS[name].packing and (causal or name not in PACKED_DECODERS):
    calls.append((train, x, ids))
  if causal:
    cache = jax.eval_shape(
      lambda params: nnx.merge(graphdef, params).init_cache(B, T, jnp.bfloat16),
      params,
    )
    decode = functools.partial(call, segment_ids=None)
    calls += [
      (lambda p, x, c: decode(p, x, cache=c), tokens(length), cache)
      for length in (1, 8)
    ]
  return set().union(*(faults(f, params, *args) for f, *args in calls))


def tokens(length):
  return jax.ShapeDtypeStruct((B, length, D), jnp.bfloat16)


def test_faults_are_found():
  def loop(x, y):
    def body(carry, _):
      wide = carry.astype(jnp.float32)
      mixed = jax.lax.dot_general(wide, y, (((1,), (0,)), ((), ())))
      return (mixed @ wide.T @ wide).astype(carry.dtype), None

    return jax.lax.scan(jax.checkpoint(body), x, length=2)[0]

  x = jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)
  found = sorted(faults(jax.jit(loop), x, x))
  assert [line.split(':')[0] for line in found] == [
    'float32 without a precision',
    'operands of two dtypes',
  ]
  assert all('precision_test.py' in line for line in found)
