"""Methods that choose their keys, against their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops.routed import lsh_attention as lsh
from efficient_attn.ops.routed import nsa, vsa
from tests.ops.routed_cases import (
  CASES,
  QKV,
  WHOLE,
  B,
  H,
  N,
  make,
  to_jax,
)
from tests.optimized import optimized
from tests.oracles import attention as attention_oracle

CAUSAL = [name for name in CASES if CASES[name].causal]
every_case = pytest.mark.parametrize('name', list(CASES))


def close(x, y, tolerance=1e-12):
  np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@every_case
def test_outputs_and_gradients(name):
  case = CASES[name]
  arrays = make(case)
  rng = np.random.default_rng(3)
  expected = case.oracle(arrays)
  weight = rng.standard_normal(expected.shape)

  @jax.jit
  def run(arrays):
    out, pull = jax.vjp(case.op, arrays)
    return out, pull(jnp.asarray(weight))[0]

  with jax.enable_x64(True):
    out, gradients = run(to_jax(arrays))
  close(out, expected)
  # What is chosen does not change on so short a way.
  step = {n: 1e-6 * rng.standard_normal(x.shape) for n, x in arrays.items()}

  def f(sign):
    return np.vdot(
      weight, case.oracle({n: x + sign * step[n] for n, x in arrays.items()})
    )

  slope = sum(np.vdot(gradients[n], step[n]) for n in arrays)
  np.testing.assert_allclose(slope, (f(1) - f(-1)) / 2, rtol=1e-6, atol=1e-12)
  for n in ('query', 'key', 'value'):
    if n in arrays:
      assert np.abs(gradients[n]).max() > 1e-3
  for n in set(arrays) & {'index_query', 'query_signs', 'gate_query'}:
    np.testing.assert_array_equal(gradients[n], 0)


def test_compressed_tokens_in_parts(monkeypatch):
  """A query at a time, and in spans that leave out later keys."""
  monkeypatch.setattr(nsa, 'CHUNK', 1)
  case = CASES['nsa']
  arrays = make(case)
  with jax.enable_x64(True):
    out = jax.jit(case.op)(to_jax(arrays))
  close(out, case.oracle(arrays))


def test_the_whole_budget_is_attention():
  arrays = {name: make(case, seed=9) for name, case in WHOLE.items()}
  gates = {'coarse_gate': np.zeros, 'fine_gate': np.ones}
  video = CASES['vsa']
  arrays['vsa'] = make(video) | {
    name: f((B, video.length, *video.shapes[name])) for name, f in gates.items()
  }
  whole = WHOLE | {'vsa': video}
  whole['vsa'].op = lambda a: vsa.vsa_attention(
    **a, cubes=vsa.cut((30,), (8,)), top_k=4
  )

  @jax.jit
  def run(arrays):
    return {name: whole[name].op(a) for name, a in arrays.items()}

  with jax.enable_x64(True):
    found = run(to_jax(arrays))
  for name, a in arrays.items():
    T = whole[name].length
    mask = np.ones((B, N, T, T), bool)
    if whole[name].causal:
      mask = np.tril(mask)
    out, _ = attention_oracle.attention(*(a[x] for x in QKV), mask)
    # Each of three clusters gives the same, and so does their mean.
    close(found[name], out)


def test_one_bucket_is_attention_to_all_others():
  rng = np.random.default_rng(0)
  T = 13
  query, value = rng.standard_normal((2, B, T, N, H))
  key = query / np.linalg.norm(query, axis=-1, keepdims=True)
  ids = np.zeros((B, T, N, 2), np.int32)

  @functools.partial(jax.jit, static_argnums=4)
  def run(query, key, value, ids, causal):
    return [
      lsh.lsh_attention(
        query,
        key,
        value,
        ids,
        num_buckets=1,
        chunk_size=size,
        causal=causal,
      )
      for size in (7, T)
    ]

  for causal in (True, False):
    mask = np.broadcast_to(~np.eye(T, dtype=bool), (B, N, T, T))
    mask = np.tril(mask) if causal else mask
    expected, lse = attention_oracle.attention(
      query, key, value, mask, scale=1.0
    )
    expected = np.where(np.isinf(lse)[..., None], value, expected)
    with jax.enable_x64(True):
      short, whole = run(*to_jax((query, key, value, ids)), causal)
    close(whole, expected)
    # Two chunks reach back as far as decoders need, encoders look one ahead.
    assert np.allclose(short, expected) == causal


def test_what_follows_changes_no_bit():
  """In an optimised program, and whatever is chosen behind."""
  names = 'moba', 'nsa', 'reformer', 'hash'  # the others share their ops
  first, second = (
    {name: make(CASES[name], seed, np.float32) for name in names}
    for seed in (0, 1)
  )

  @optimized
  def run(arrays):
    return {name: CASES[name].op(a) for name, a in arrays.items()}

  out = run(first)
  for cut in (1, 5, 8, 14, 20):
    mixed = jax.tree.map(
      lambda x, y, cut=cut: np.concatenate([x[:, :cut], y[:, cut:]], 1),
      first,
      second,
    )
    found = run(mixed)
    for name in names:
      np.testing.assert_array_equal(
        found[name][:, :cut], out[name][:, :cut], name
      )
      assert (found[name][:, cut:] != out[name][:, cut:]).any(), name


def test_published_chunks_of_reformer_look_ahead():
  """Why ours begin anew with every bucket."""
  rng = np.random.default_rng(0)
  T, cut = 20, 12
  query, value = rng.standard_normal((2, 1, T, 1, H)).astype(np.float32)
  ids = rng.integers(0, 4, (1, T, 1, 1)).astype(np.int32)
  ids[:, 0], ids[:, cut:] = 0, 3
  other = ids.copy()
  other[:, cut:] = 0

  @jax.jit
  def run(query, value, ids):
    args = query, query, value, ids
    return [
      f(*args, num_buckets=4, chunk_size=5)[:, :cut]
      for f in (lsh.sorted_chunk_attention, lsh.lsh_attention)
    ]

  published, ours = zip(
    run(query, value, ids), run(query, value, other), strict=True
  )
  assert (published[0] != published[1]).any()
  np.testing.assert_array_equal(ours[0], ours[1])


@pytest.mark.in_turn
def test_queries_from_an_offset_on():
  """As with a cache: later keys are there, and are anything."""
  names = [n for n in CAUSAL if CASES[n].queries and n != 'sinkhorn']
  arrays = {name: make(CASES[name]) for name in names}
  rng = np.random.default_rng(2)

  @jax.jit
  def run(arrays, offset):
    return {name: CASES[name].op(a, offset) for name, a in arrays.items()}

  def piece(name, array, start, stop):
    if name in CASES[owner].queries:
      return array[:, start:stop]
    noise = rng.standard_normal(array[:, stop:].shape)
    return np.concatenate([array[:, :stop], noise], 1)

  for start in (1, 6, 9):
    stop = start + 7
    pieces = {}
    for owner, a in arrays.items():
      pieces[owner] = {n: piece(n, x, start, stop) for n, x in a.items()}
    with jax.enable_x64(True):
      found = run(to_jax(pieces), jnp.int32(start))
    for name in names:
      expected = CASES[name].oracle(arrays[name])
      close(found[name], expected[:, start:stop])
