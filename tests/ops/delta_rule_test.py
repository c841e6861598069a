"""Every form of the delta rule and of dplr against the recurrence."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_attn.ops import linear_attention
from efficient_attn.ops.recurrent.affine_summary import affine_summary
from efficient_attn.ops.recurrent.delta_product import delta_product
from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.values import ConfigError
from tests.ops.delta_rule_cases import (
  BATCH,
  CHANNELS,
  CHUNK,
  GATES,
  HEADS,
  LENGTH,
  OPS,
  ORACLES,
  VALUES,
  apply,
  cotangents,
  make,
  reference,
  segments,
  vjp,
)
from tests.ops.linear_attention_cases import assert_close, to_jax
from tests.optimized import optimized
from tests.rotation import combinations


@pytest.mark.parametrize('op, gate', combinations(OPS, GATES))
def test_chunks_equal_tokens_in_outputs_states_and_gradients(op, gate):
  arrays, expected = reference(op, gate)
  with jax.enable_x64(True):
    actual = vjp(
      to_jax(arrays),
      to_jax(cotangents()),
      segments(),
      op=op,
      form='chunkwise',
      chunk_size=CHUNK,
    )
  assert_close(actual, expected, 1e-11)


OPTIONS = [
  ('delta', 'scalar', (('read', 'exclusive'),)),
  ('dplr', 'channel', (('read', 'exclusive'),)),
  ('erase', 'channel', (('bidirectional', True),)),
  ('dplr', 'none', (('bidirectional', True), ('read', 'exclusive'))),
]


@pytest.mark.parametrize(
  'case, form', combinations(OPTIONS, ['chunkwise', 'parallel'])
)
def test_options(case, form):
  op, gate, options = case
  arrays, expected = reference(op, gate, options)
  with jax.enable_x64(True):
    actual = vjp(
      to_jax(arrays),
      to_jax(cotangents()),
      segments(),
      op=op,
      form=form,
      chunk_size=CHUNK,
      **dict(options),
    )
  assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize('length', [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 13])
@pytest.mark.parametrize('op', ['delta', 'dplr'])
def test_lengths_and_chunk_sizes(op, length):
  arrays = make(op, 'channel', length)
  ids = segments(length)
  expected = ORACLES[op](**arrays, segment_ids=ids)
  with jax.enable_x64(True):
    for size in (CHUNK, 64) if length in (1, 13) else (CHUNK,):
      actual = apply(to_jax(arrays), ids, op=op, chunk_size=size)
      assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize('op, gate', [('erase', 'channel'), ('dplr', 'scalar')])
def test_packed_equals_separate(op, gate):
  lengths = (6, 1, 1, 6, 6)
  cuts = np.cumsum((0, *lengths))
  ids = np.repeat(np.array([4, 1, 2, 1, 7]), lengths)[None].astype(np.int32)
  ids = np.repeat(ids, BATCH, 0)
  arrays = make(op, gate, cuts[-1], state=False)
  run = functools.partial(vjp, op=op, form='chunkwise', chunk_size=CHUNK)
  with jax.enable_x64(True):
    arrays, given = to_jax(arrays), to_jax(cotangents(cuts[-1]))
    out, state, grads = run(arrays, given, ids)
    for a, b in zip(cuts, cuts[1:], strict=False):
      cut = lambda x, a=a, b=b: x[:, a:b]  # noqa: E731
      last = given[1] if b == cuts[-1] else jnp.zeros_like(given[1])
      separate = run(jax.tree.map(cut, arrays), (cut(given[0]), last))
      assert_close(cut(out), separate[0], 1e-12)
      assert_close(jax.tree.map(cut, grads), separate[2], 1e-12)
    assert_close(state, separate[1], 1e-12)


@pytest.mark.parametrize('op', ['delta', 'dplr'])
def test_state_continues_at_every_cut(op):
  arrays = make(op, 'channel', 7, state=False)
  expected = ORACLES[op](**arrays)
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    for cut in range(1, 7):
      state, outs = jnp.zeros((BATCH, HEADS, CHANNELS, VALUES)), []
      for span in (slice(0, cut), slice(cut, 7)):
        piece = {name: x[:, span] for name, x in arrays.items()}
        out, state = apply(
          piece | {'initial_state': state}, op=op, chunk_size=2
        )
        outs.append(out)
      assert_close((jnp.concatenate(outs, 1), state), expected, 1e-12)


@pytest.mark.parametrize('cut', [False, True])
@pytest.mark.parametrize('op', ['erase', 'dplr'])
def test_affine_summaries_compose(op, cut):
  arrays = make(op, 'channel', 13)
  ids = segments(13) if cut else None
  _, expected = ORACLES[op](**arrays, segment_ids=ids)
  initial = arrays.pop('initial_state')
  del arrays['q']
  summary = jax.jit(functools.partial(affine_summary, chunk_size=4))
  with jax.enable_x64(True):
    arrays = to_jax(arrays)
    m, u = summary(**arrays, segment_ids=ids)
    assert m.shape == (BATCH, HEADS, CHANNELS, CHANNELS)
    assert_close(m @ initial + u, expected, 1e-12)
    if not cut:
      parts = [
        summary(**{k: x[:, span] for k, x in arrays.items()})
        for span in (slice(0, 6), slice(6, 13))
      ]
      (m1, u1), (m2, u2) = parts
      assert_close((m2 @ m1, m2 @ u1 + u2), (m, u), 1e-12)


@pytest.mark.parametrize(
  'op, gate', combinations(['erase', 'dplr'], ['none', 'scalar', 'channel'])
)
def test_causality_is_bitwise(op, gate):
  to_32 = functools.partial(jax.tree.map, np.float32)
  arrays = to_32(make(op, gate, 37, state=False))
  other = to_32(make(op, gate, 37, state=False, seed=3))
  ids, other_ids = segments(37), segments(37, seed=8)
  if gate != 'none':
    other['log_decay'] *= 1000

  @optimized
  def call(arrays, ids):
    return OPS[op](**arrays, segment_ids=ids, form='chunkwise', chunk_size=16)[
      0
    ]

  out = call(to_jax(arrays), ids)
  for cut in (1, 7, 15, 16, 17, 36):
    splice = lambda x, y, cut=cut: np.concatenate([x[:, :cut], y[:, cut:]], 1)  # noqa: E731
    changed = call(
      to_jax(jax.tree.map(splice, arrays, other)), splice(ids, other_ids)
    )
    np.testing.assert_array_equal(
      changed[:, :cut], out[:, :cut], f'cut at {cut}'
    )
    assert np.any(changed[:, cut:] != out[:, cut:]), cut


def test_identities():
  arrays = make('delta', 'channel', kv_heads=HEADS)
  q, k, v, beta, gate, state = arrays.values()
  call = functools.partial(apply, chunk_size=CHUNK)
  with jax.enable_x64(True):
    delta = call(to_jax(arrays), op='delta')
    # The normal form: a = alpha k, b = -beta k, values beta v.
    normal = dict(
      q=q,
      k=k,
      v=beta[..., None] * v,
      a=np.exp(gate) * k,
      b=-beta[..., None] * k,
      log_decay=gate,
      initial_state=state,
    )
    assert_close(call(to_jax(normal), op='dplr'), delta, 1e-12)
    # erase = 1 is no erase; scaling erase, writes and beta is GDN-2's form.
    arrays = dict(arrays, erase=np.ones_like(gate))
    assert_close(call(to_jax(arrays), op='erase'), delta, 1e-12)
    strengths = dict(
      q=q,
      k=k,
      v=beta[..., None] * v,
      beta=np.ones_like(beta),
      erase=np.repeat(beta[..., None], CHANNELS, -1),
      log_decay=gate,
      initial_state=state,
    )
    assert_close(call(to_jax(strengths), op='erase'), delta, 1e-12)
    # KDA with one gate for all channels is GDN; without decay, DeltaNet.
    scalar = dict(arrays, log_decay=gate[..., 0])
    channel = dict(arrays, log_decay=np.repeat(gate[..., :1], CHANNELS, -1))
    assert_close(
      call(to_jax(scalar), op='erase'), call(to_jax(channel), op='erase'), 1e-12
    )
    still = dict(arrays, log_decay=np.zeros_like(gate))
    del arrays['log_decay']
    assert_close(
      call(to_jax(still), op='erase'), call(to_jax(arrays), op='erase'), 1e-12
    )
    # Nothing erased, or nothing read by a: linear attention.
    plain = linear_attention(
      *to_jax((q, k, beta[..., None] * v)),
      log_decay=jnp.asarray(gate),
      initial_state=jnp.asarray(state),
    )
    idle = dict(normal, a=np.zeros_like(k))
    assert_close(call(to_jax(idle), op='dplr'), plain, 1e-12)
    never = dict(arrays, erase=np.zeros_like(gate), log_decay=gate)
    assert_close(call(to_jax(never), op='erase'), plain, 1e-12)
    # Orthonormal keys and beta = 1 overwrite: nothing is ever erased.
    keys = np.eye(CHANNELS)[None, :, None].repeat(BATCH, 0).repeat(HEADS, 2)
    v = v[:, :CHANNELS]
    ones = np.ones(v.shape[:3])
    one = delta_rule(*to_jax((keys, keys, v, ones)), scale=1)
    assert_close(one, linear_attention(*to_jax((keys, keys, v)), scale=1), 0)
    assert_close(one[0], v, 0)


def test_elementwise_reading_of_the_transition_is_wrong():
  # Erratum: eq. 46 and Tables 6-7 of the attention survey print G * H with
  # G = I - beta k k^T for the delta rule; it is the matrix product G H.
  arrays = make('delta', 'none', kv_heads=HEADS, state=False)
  q, k, v, beta = (x[0, :, 0] for x in arrays.values())
  with jax.enable_x64(True):
    ours = np.asarray(apply(to_jax(arrays), op='delta')[0])[0, :, 0]
  results = []
  for times in (np.multiply, np.matmul):
    state, out = np.zeros((CHANNELS, VALUES)), np.zeros((LENGTH, VALUES))
    for t in range(LENGTH):
      gate = np.eye(CHANNELS) - beta[t] * np.outer(k[t], k[t])
      if times is np.multiply:
        gate = np.resize(gate, state.shape)
      state = times(gate, state) + beta[t] * np.outer(k[t], v[t])
      out[t] = CHANNELS**-0.5 * q[t] @ state
    results.append(np.linalg.norm(ours - out) / np.linalg.norm(ours))
  assert results[0] > 0.1 and results[1] < 1e-12


def test_side_of_the_transition_of_rwkv7():
  # Erratum: the transition stands left of the key x value state; on the
  # value x key state of the survey it must stand on the right.
  arrays = make('dplr', 'channel', kv_heads=HEADS, state=False)
  arrays['v'] = arrays['v'][..., :CHANNELS]
  q, k, v, a, b, gate = (x[0, :, 0] for x in arrays.values())
  with jax.enable_x64(True):
    ours = np.asarray(apply(to_jax(arrays), op='dplr')[0])[0, :, 0]
  results = []
  for left in (True, False):
    state, out = np.zeros((CHANNELS, CHANNELS)), np.zeros((LENGTH, CHANNELS))
    for t in range(LENGTH):
      transition = np.diag(np.exp(gate[t])) + np.outer(a[t], b[t])
      state = transition @ state if left else state @ transition
      state = state + np.outer(v[t], k[t])
      out[t] = CHANNELS**-0.5 * state @ q[t]
    results.append(np.linalg.norm(ours - out) / np.linalg.norm(ours))
  assert results[0] > 0.1 and results[1] < 1e-12


ERRORS = {
  'q has shape': lambda a: {**a, 'q': a['q'][:, :-1]},
  'beta has shape': lambda a: {**a, 'beta': a['beta'][:, :-1]},
  'erase has shape': lambda a: {**a, 'erase': a['k']},
  'beta has dtype': lambda a: {**a, 'beta': jnp.ones(a['beta'].shape, int)},
  'no kind of gate': lambda a: {**a, 'log_decay': jnp.zeros((2, 13, 2))},
  'log_decay has dtype': lambda a: {**a, 'log_decay': jnp.zeros((4,), int)},
  'positive value 0.5': lambda a: {**a, 'log_decay': jnp.full((4,), 0.5)},
  'power of two': lambda a: {**a, 'chunk_size': 48},
  "form = 'chunk'": lambda a: {**a, 'form': 'chunk'},
  "read = 'before'": lambda a: {**a, 'read': 'before'},
  'no meaning with bidirectional': lambda a: {
    **a,
    'bidirectional': True,
    'initial_state': jnp.zeros((2, 4, 3, 5)),
  },
  'initial_state has shape': lambda a: {
    **a,
    'initial_state': jnp.zeros((2, 4, 5, 3)),
  },
}


@pytest.mark.parametrize('message', ERRORS)
def test_wrong_calls_say_what_is_wrong(message):
  arrays = make('delta', 'none', 13, state=False)
  arrays = to_jax(jax.tree.map(np.float32, arrays))
  call = inspect.unwrap(delta_rule)
  with pytest.raises(ValueError, match=message):
    call(**ERRORS[message](arrays))


def test_unknown_implementation():
  arrays = to_jax(make('delta', 'none', 13, state=False))
  with pytest.raises(ConfigError, match="did you mean 'pallas_tpu'"):
    delta_rule(**jax.tree.map(jnp.float32, arrays), implementation='cudnn')


@pytest.mark.parametrize('bidirectional', [False, True])
def test_delta_product_is_steps_of_the_delta_rule(bidirectional):
  rng = np.random.default_rng(0)
  steps, kv_heads, length = 3, 2, 7
  q = rng.standard_normal((BATCH, length, kv_heads, CHANNELS))
  k = rng.standard_normal((BATCH, length, kv_heads, steps, CHANNELS)) / 2
  v = rng.standard_normal((BATCH, length, HEADS, steps, VALUES))
  beta = rng.uniform(0, 2, (BATCH, length, HEADS, steps))
  gate = -rng.exponential(0.3, (BATCH, length, HEADS))
  ids = segments(length)
  expected = np.zeros((BATCH, length, HEADS, VALUES))
  orders = [range(length)] + [range(length)[::-1]] * bidirectional
  for b, n, order in itertools.product(range(BATCH), range(HEADS), orders):
    state, before = np.zeros((CHANNELS, VALUES)), None
    for t in order:
      if before is not None and ids[b, t] != ids[b, before]:
        state = np.zeros_like(state)
      state, before = np.exp(gate[b, t, n]) * state, t
      for m in range(steps):
        key = k[b, t, n // 2, m]
        update = v[b, t, n, m] - key @ state
        state = state + beta[b, t, n, m] * np.outer(key, update)
      expected[b, t, n] += CHANNELS**-0.5 * q[b, t, n // 2] @ state
  with jax.enable_x64(True):
    call = jax.jit(
      functools.partial(
        delta_product,
        form='chunkwise',
        chunk_size=CHUNK,
        bidirectional=bidirectional,
      )
    )
    out, _ = call(
      *to_jax((q, k, v, beta)), log_decay=gate, segment_ids=jnp.asarray(ids)
    )
    assert_close(out, expected, 1e-12)


def test_delta_product_refuses_a_constant_gate_and_unequal_steps():
  x = jnp.ones((1, 5, 2, 3, 4))
  call = inspect.unwrap(delta_product)
  with pytest.raises(ValueError, match='pass a gate per token'):
    call(x[..., 0, :], x, x, x[..., 0], log_decay=jnp.zeros(2))
  with pytest.raises(ValueError, match='v has 2 steps and k 3'):
    call(x[..., 0, :], x, x[..., :2, :], x[..., :2, 0])


@pytest.mark.in_turn
@pytest.mark.parametrize(
  'op, gate',
  [
    ('delta', 'scalar'),
    pytest.param('dplr', 'channel', marks=pytest.mark.exhaustive),
  ],
)
def test_vmap_and_second_order(op, gate):
  """The change of a gradient along a direction, and stacked calls."""
  arrays, ids = make(op, gate), jnp.asarray(segments())
  rng = np.random.default_rng(3)
  step = jax.tree.map(lambda x: rng.standard_normal(x.shape), arrays)

  def loss(arrays, form):
    out, state = OPS[op](**arrays, segment_ids=ids, form=form, chunk_size=CHUNK)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

  @functools.partial(jax.jit, static_argnames='form')
  def second(arrays, step, form):
    grad = jax.grad(functools.partial(loss, form=form))
    return jax.jvp(grad, (arrays,), (step,))[1]

  with jax.enable_x64(True):
    given = to_jax(arrays), to_jax(step)
    expected = second(*given, 'recurrent')
    assert_close(second(*given, 'chunkwise'), expected, 1e-9)
    pairs = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), given)
    mapped = jax.vmap(functools.partial(second, form='chunkwise'))(*pairs)
    half = second(*jax.tree.map(lambda x: 0.5 * x, given), 'chunkwise')
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), expected, half)
    assert_close(mapped, stacked, 1e-9)
