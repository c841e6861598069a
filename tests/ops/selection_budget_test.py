"""Every row of `SELECTORS`: exact with everything, and better than chance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import masks
from efficient_attn.ops.selection import SELECTORS, retained_mass
from efficient_attn.ops.softmax.attention import attention
from tests.ops import selection_cases as cases

SHARES = (0.1, 0.25, 0.5, 1.0)
MASKS = sorted(n for n, row in SELECTORS.items() if row.returns != 'heads')
CAUSAL = [n for n in MASKS if SELECTORS[n].sees != 'grid']
S = 128


def select(row, share, size, query, key, value):
  """The mask expression and the bias of one row."""
  arrays = (query, key, value) if row.needs_value else (query, key)
  found = row.select(*arrays, **row.options(share, size))
  return found if row.returns == 'mask and bias' else (found, None)


def size_and_data(row):
  return (cases.GRID, cases.video) if row.sees == 'grid' else (S, cases.text)


def base_of(row):
  return None if row.sees == 'grid' else masks.Causal()


@functools.cache
def whole(make, base):
  arrays = (jnp.asarray(x, jnp.float32) for x in make())
  return jax.jit(attention)(*arrays, mask=base)


@functools.cache
def run(name):
  """What is kept of the structured data at each share of SHARES."""
  row = SELECTORS[name]
  size, make = size_and_data(row)
  base = base_of(row)

  def kept(q, k, v):
    T = q.shape[1]
    causal = masks.Window(None, None) if base is None else base
    causal = causal.dense(T, T)
    results = []
    for share in SHARES:
      mask, bias = select(row, share, size, q, k, v)
      dense = jnp.broadcast_to(mask.dense(T, T), (1, q.shape[2], T, T))
      results.append(
        dict(
          density=(dense.sum(-1) / causal.sum(-1)).mean((0, 2)),
          mass=retained_mass(q, k, mask, base).mean((0, 1)),
          ahead=(dense & ~causal).any(),
          nothing=~dense.any(-1).all(),
        )
      )
    return results, attention(q, k, v, mask=mask, bias=bias)

  arrays = (jnp.asarray(x, jnp.float32) for x in make())
  return jax.jit(kept)(*arrays)


@pytest.mark.parametrize('name', MASKS)
def test_everything_kept_is_exact_attention(name):
  results, found = run(name)
  row = SELECTORS[name]
  expected = whole(size_and_data(row)[1], base_of(row))
  np.testing.assert_array_equal(results[-1]['density'], 1)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('name', MASKS)
def test_mass_grows_with_the_budget_and_beats_chance(name):
  results, _ = run(name)
  density = np.array([r['density'] for r in results])
  mass = np.array([r['mass'] for r in results])
  np.testing.assert_array_less(density[0], 0.6)
  assert density[0].mean() < density[2].mean()
  np.testing.assert_array_less(-1e-6, np.diff(density, axis=0))
  np.testing.assert_array_less(-1e-6, np.diff(mass, axis=0))
  # Keys drawn uniformly keep, on average, as much of P as of the keys.
  np.testing.assert_array_less(density[:-1], mass[:-1])
  assert mass[:-1].mean() > 1.15 * density[:-1].mean()


@pytest.mark.parametrize('name', CAUSAL)
def test_never_reads_ahead(name):
  assert not any(r['ahead'] or r['nothing'] for r in run(name)[0])


# Queries and keys from these on are replaced by others.
CUTS = (8, 13, 64, 96, 101, 120)
BLOCK = 8


@functools.cache
def changed(name):
  """The first row of the mask that changes with each cut, S for none."""
  q, k, _ = (jnp.asarray(x, jnp.float32) for x in cases.text())
  rng = np.random.default_rng(1)
  cuts = jnp.array((S, *CUTS))[:, None, None, None]
  after = jnp.arange(S)[:, None, None] >= cuts
  q, k = (
    jnp.where(after, jnp.float32(5 * rng.standard_normal(x.shape)), x)
    for x in (q, k)
  )

  def rows(q, k):
    mask, _ = select(SELECTORS[name], 0.25, S, q, k, None)
    dense = jnp.broadcast_to(mask.dense(S, S), (len(q), q.shape[2], S, S))
    differs = (dense[1:] != dense[:1]).any((1, 3))
    return jnp.where(differs.any(-1), jnp.argmax(differs, axis=-1), S)

  return np.asarray(jax.jit(rows)(q, k))


@pytest.mark.parametrize('name', CAUSAL)
def test_selection_depends_on_what_the_table_says(name):
  found, sees = changed(name), SELECTORS[name].sees
  cuts = np.array(CUTS)
  if sees == 'token':
    np.testing.assert_array_less(cuts - 1, found)
  if sees == 'block':
    np.testing.assert_array_less(cuts // BLOCK * BLOCK - 1, found)
    assert (found < cuts).any()  # or the table should promise more
  if sees == 'prompt':
    assert (found < cuts // BLOCK * BLOCK).any()


STEPS = sorted(n for n in CAUSAL if SELECTORS[n].sees == 'token')


@pytest.mark.parametrize('name', [n for n in STEPS if n != 'infllm'])
def test_a_step_of_decoding_reads_what_the_prompt_read(name):
  with jax.enable_x64(True):
    q, k, v = (jnp.asarray(x) for x in cases.text(S=32))

    def rows(q, k):
      mask, bias = select(SELECTORS[name], 0.25, 32, q, k, None)
      T = q.shape[1]
      dense = mask.dense(T, 32)
      return dense if bias is None else jnp.where(dense, bias.dense(T, 32), 9)

    rows = jax.jit(rows)
    np.testing.assert_allclose(
      rows(q[:, -3:], k), rows(q, k)[:, :, -3:], rtol=1e-12
    )


def test_selection_is_not_differentiated():
  """Gradients are those of attention with what was selected held fixed."""
  row = SELECTORS['magicpig']
  q, k, v = (jnp.asarray(x, jnp.float32) for x in cases.text(S=32))

  def loss(q, k, v, held=None):
    mask, bias = held or select(row, 0.25, 32, q, k, v)
    return jnp.sum(attention(q, k, v, mask=mask, bias=bias) ** 2)

  grad = jax.jit(jax.grad(loss, (0, 1, 2)))
  held = select(row, 0.25, 32, q, k, v)
  for x, y in zip(grad(q, k, v), grad(q, k, v, held), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
