"""Blockwise attention under random masks: at most twice the rounding error.

Both implementations run in float32, or both in float64, and are compared with
the reference in the highest precision there is.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_attn.ops import masks
from tests.ops.attention_cases import attention_blockwise, attention_reference

B, H, V = 2, 4, 3
# T, S, N, K
SHAPES = [(13, 7, 4, 2), (1, 16, 4, 1), (12, 12, 2, 2), (5, 11, 3, 3)]


# What is drawn are plans, (constructor, arguments): hypothesis wants no code
# that may draw random numbers, as JAX does, inside its strategies.
def plan(make, *arguments):
  return st.tuples(st.just(make), st.tuples(*arguments))


def build(made):
  make, arguments = made
  return make(*arguments)


def combine(make, *parts):
  return make(*map(build, parts))


small = st.integers(0, 5)
far = st.none() | st.integers(-3, 6)
static = st.one_of(
  plan(masks.Causal, st.integers(-4, 4)),
  plan(masks.Window, far, far, st.integers(-3, 3)),
  plan(masks.Dilated, small, small, st.integers(1, 4)),
  plan(masks.Strided, st.integers(1, 6)),
  plan(masks.LogSparse, small),
  plan(masks.Fixed, st.integers(2, 6), st.integers(0, 2)),
  plan(masks.BlockWindow, st.integers(1, 5), small, small),
  plan(masks.Prefix, small),
  plan(masks.Leading, small),
  plan(masks.Global, st.sets(st.integers(0, 15), max_size=3).map(tuple)),
  plan(masks.Radial, st.integers(1, 8), st.just(16), st.integers(1, 3)),
  plan(
    masks.Neighborhood, st.just((4, 4)), st.tuples(*[st.integers(1, 5)] * 2)
  ),
  plan(
    masks.RandomBlocks,
    st.just(16),
    st.integers(1, 4),
    st.integers(0, 3),
    small,
    st.booleans(),
  ),
)


def made_of_arrays(kind, rule, seed, block, rank, traced, T, S, N):
  """A mask made of arrays, known at trace time or not."""
  rng = np.random.default_rng(seed)

  def array(x):
    x = np.asarray(x, np.int32 if x.dtype != bool else bool)
    return jnp.asarray(x) if traced else x

  def ids(length):
    return array(np.sort(rng.integers(0, 4, (B, length)), axis=1))

  if kind == 'causal':
    return masks.Causal(jnp.asarray(rng.integers(-4, 4, B), jnp.int32))
  if kind == 'segments':
    return masks.Segments(ids(T), ids(S))
  if kind == 'blocks':
    layout = (B, N, -(-T // block[0]), -(-S // block[1]))[4 - rank :]
    return masks.Blocks(array(rng.random(layout) < 0.4), *block)
  if kind == 'windows':
    left, right = rng.integers(0, 6, N), rng.integers(-2, 6, N)
    return masks.HeadWindow(array(left), array(right))
  if kind == 'heads':
    return masks.Heads(array(rng.random(N) < 0.5))
  if kind == 'dense':
    return masks.Dense(array(rng.random((B, 1, T, S)) < 0.3))
  return masks.At(build(rule), ids(T), ids(S))


KINDS = ('causal', 'segments', 'blocks', 'windows', 'heads', 'dense', 'at')


def expressions(T, S, N):
  blocks = st.tuples(st.integers(1, 5), st.integers(1, 5))
  arrays = plan(
    functools.partial(made_of_arrays, T=T, S=S, N=N),
    st.sampled_from(KINDS),
    static,
    small,
    blocks,
    st.integers(2, 4),
    st.booleans(),
  )

  def join(inner):
    def both(op):
      return plan(functools.partial(combine, op), inner, inner)

    return st.one_of(
      both(masks.And),
      both(masks.Or),
      plan(functools.partial(combine, masks.Not), inner),
    )

  return st.recursive(static | arrays, join, max_leaves=4)


def gradients(op):
  """The program of outputs and gradients."""

  def loss(tensors, mask):
    out, lse = op(*tensors, mask=mask)
    seen = jnp.where(lse == -jnp.inf, 0, lse)
    both = jnp.concatenate([out.reshape(-1), seen.reshape(-1)])
    return jnp.sum(both * jnp.cos(jnp.arange(both.size))), both

  return jax.value_and_grad(loss, has_aux=True)


reference = jax.jit(gradients(attention_reference))


def as_float64(result):
  (_, out), gradients = result
  return [np.asarray(x, np.float64) for x in (out, *gradients)]


def check(data):
  T, S, N, K = data.draw(st.sampled_from(SHAPES))
  mask = data.draw(expressions(T, S, N))
  dtype = data.draw(st.sampled_from([np.float32, np.float64]))
  blocks = data.draw(st.sampled_from([(4, 3), (5, 8)]))
  rng = np.random.default_rng(data.draw(small))
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, V)
  tensors = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
  blockwise = functools.partial(
    attention_blockwise, block_q=blocks[0], block_k=blocks[1]
  )
  with jax.enable_x64(dtype == np.float64):
    mask = build(mask)
    tensors = [jnp.asarray(x) for x in tensors]
    # Not an argument of the program: its arrays of numpy stay known.
    grad = gradients(blockwise)
    found = as_float64(jax.jit(lambda tensors: grad(tensors, mask))(tensors))
    # As an array, so that all masks share the program of the reference.
    dense = np.array(jax.jit(lambda: mask.dense(T, S))())
    dense = masks.Dense(jnp.asarray(np.broadcast_to(dense, (B, N, T, S))))
    plain = as_float64(reference(tensors, dense))
  with jax.enable_x64(True):
    tensors = [x.astype(jnp.float64) for x in tensors]
    exact = as_float64(reference(tensors, dense))
  for x, y, z in zip(found, plain, exact, strict=True):
    # The reference may be right by luck, and in float64 it is what counts.
    least = 4 * np.finfo(dtype).eps * max(1, np.abs(z).max())
    if dtype == np.float64:
      least *= 100
    assert np.abs(x - z).max() <= 2 * np.abs(y - z).max() + least


options = functools.partial(
  hypothesis.settings,
  deadline=None,
  database=None,
  derandomize=True,
  phases=[hypothesis.Phase.generate],  # to shrink would compile for minutes
)


@pytest.mark.in_turn
@options(max_examples=15)
@hypothesis.given(st.data())
def test_random_masks(data):
  check(data)


@pytest.mark.exhaustive
@options(max_examples=300)
@hypothesis.given(st.data())
def test_many_random_masks(data):
  check(data)
