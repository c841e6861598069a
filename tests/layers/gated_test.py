"""Mixers with gates against the equations of their papers, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_attn import formats
from efficient_attn.config import ConfigError
from efficient_attn.ops.recurrent.linear_attention import linear_attention
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.ops.recurrent.trapezoid import trapezoidal_scan
from tests.layers.built import built
from tests.oracles import gated as oracles
from tests.oracles import linear_attention as linear_oracles

B, T, D, N = 1, 11, 32, 4
FACTORS = (0.5, 2.0, 1.5, 0.7, 0.9)


def build(name, num_heads=N, **options):
  return built(name, d_model=D, num_heads=num_heads, **options)


def make(name, **options):
  """A mixer with noise on all its parameters, as some start at zero."""
  mixer = build(name, **options)
  rng = np.random.default_rng(0)
  graphdef, params = nnx.split(mixer)
  noisy = jax.tree.map(
    lambda p: p + 0.1 * jnp.asarray(rng.standard_normal(p.shape), p.dtype),
    params,
  )
  return nnx.merge(graphdef, noisy)


def values(mixer):
  """The parameters by path, 'query.weight', in float64."""
  flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
  return {
    '.'.join(map(str, path)): np.asarray(p[...], np.float64) for path, p in flat
  }


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.log1p(np.exp(x))


def project(p, name, x, inputs=1):
  """x times the matrix `name`, which contracts `inputs` axes, and its bias."""
  y = np.tensordot(x, p[f'{name}.weight'], inputs)
  return y + p.get(f'{name}.bias', 0)


def convolve(p, name, x):
  """silu of the causal convolution `name` over [B, T, ...]."""
  weight = p[f'{name}.weight']
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    for i, tap in enumerate(weight):
      source = t - (len(weight) - 1) + i
      if source >= 0:
        y[:, t] += tap * x[:, source]
  return silu(y + p.get(f'{name}.bias', 0))


def joint_norm(p, x):
  return (
    x / np.sqrt((x**2).mean((-2, -1), keepdims=True) + 1e-5) * p['norm.scale']
  )


def head_norm(p, x, eps=1e-5):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
  return x * p['norm.scale'] + p.get('norm.bias', 0)


def previous(x):
  return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], 1)


def hgrn2(p, x):
  f = 0.2 + 0.8 * sigmoid(project(p, 'forget', x))
  o, _ = linear_oracles.linear_attention(
    silu(project(p, 'query', x)),
    1 - f,
    project(p, 'value', x),
    log_decay=np.log(f),
    scale=1,
  )
  return project(p, 'out', joint_norm(p, o), 2)


def metala(p, x):
  x = convolve(p, 'conv', x)
  alpha = sigmoid(project(p, 'decay', x)) ** (1 / 16)
  q, v = project(p, 'query', x), project(p, 'value', x)
  o, _ = linear_oracles.linear_attention(
    q, 1 - alpha, v, log_decay=np.log(alpha)
  )
  own = np.sum(q * p['augment'] * (1 - alpha), -1)[..., None] * v
  o = head_norm(p, o + sigmoid(own))
  return project(p, 'out', o * silu(project(p, 'gate', x)), 2)


def gsa(p, x):
  q, k, v = (silu(project(p, name, x)) for name in ('query', 'key', 'value'))
  alpha = sigmoid(project(p, 'decay', x)) ** (1 / 8)
  o, _ = oracles.gated_slot_attention(q, k, v, np.log(alpha), scale=1)
  return project(p, 'out', joint_norm(p, silu(o)), 2)


def rodimus(p, x):
  u = project(p, 'up', x)
  c = convolve(p, 'conv', u)
  g = softplus(project(p, 'select', c, 2))
  tau = sigmoid(project(p, 'temper', c, 2))
  k = project(p, 'key', c, 2)
  k = k / np.linalg.norm(k, axis=-1, keepdims=True) * g**tau
  q = project(p, 'query', c, 2)
  write = project(p, 'write_up', project(p, 'write_down', u, 2))
  log_decay = np.repeat((-g * tau)[:, :, None], N, axis=2)
  o, _ = linear_oracles.linear_attention(
    q[:, :, None], k[:, :, None], u * sigmoid(write), log_decay=log_decay
  )
  o = joint_norm(p, (o + p['skip'] * c) * silu(project(p, 'gate', x)))
  return project(p, 'out', o, 2)


def rwkv(p, x, mixed, log_decay):
  r, k, v, g = mixed
  o, _ = linear_oracles.linear_attention(
    project(p, 'receptance', r),
    project(p, 'key', k),
    project(p, 'value', v),
    log_decay=log_decay,
    bonus=p['bonus'],
    read='exclusive',
    scale=1,
  )
  # The norm of o / 8 with eps = 1e-5, as published.
  o = head_norm(p, o / 8) * silu(project(p, 'gate', g))
  return project(p, 'out', o, 2)


def rwkv5(p, x):
  mixed = [x + (previous(x) - x) * mu for mu in p['shifts']]
  decay = np.broadcast_to(-np.exp(p['decay']), (B, T, N, D // N))
  return rwkv(p, x, mixed, decay)


def rwkv6(p, x):
  delta = previous(x) - x
  low = np.tanh(project(p, 'shift_down', x + delta * p['shifts'][0]))
  *mixed, w = (
    x + delta * (p['shifts'][i + 1] + low[:, :, i] @ p['shift_up'][i])
    for i in range(5)
  )
  lora = project(p, 'decay_up', np.tanh(project(p, 'decay_down', w)))
  return rwkv(p, x, mixed, -np.exp(p['decay'] + lora))


def mamba2(p, x, groups=1, factors=(1,) * 5, limits=(0, np.inf)):
  z, of_x, b, c, of_dt = factors
  v = convolve(p, 'x_conv', of_x * project(p, 'x', x))
  bc = np.split(project(p, 'bc', x), 2, axis=-1)
  bc = convolve(p, 'bc_conv', np.concatenate([b * bc[0], c * bc[1]], -1))
  bc = bc.reshape(*bc.shape[:2], 2, groups, -1)
  # Copies for the heads of a group.
  k, q = np.moveaxis(bc.repeat(v.shape[2] // groups, axis=3), 2, 0)
  dt = np.clip(softplus(of_dt * project(p, 'dt', x) + p['dt_bias']), *limits)
  o, _ = linear_oracles.linear_attention(
    q,
    k,
    dt[..., None] * v,
    log_decay=-np.exp(p['a_log']) * dt,
    scale=1,
  )
  o, gate = o + p['skip'] * v, silu(z * project(p, 'gate', x))
  if 'norm.scale' not in p:
    return project(p, 'out', o * gate, 2)
  if groups == 1:
    return project(p, 'out', joint_norm(p, o * gate), 2)
  square = o.reshape(*o.shape[:2], groups, -1) ** 2
  square = square.mean(-1).repeat(o.shape[2] // groups, axis=-1)[..., None]
  o = o / np.sqrt(square + 1e-5) * p['norm.scale'] * gate
  return project(p, 'out', o, 2)


def falcon_h1(p, x):
  return mamba2(p, x, 2, FACTORS, (0.2, 0.6))


def mamba3(p, x):
  def key(name):
    y = project(p, name, x)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return (y * p[f'{name}_norm.scale'])[:, :, None] + p[f'{name}_bias']

  v = project(p, 'x', x)
  dt = softplus(project(p, 'dt', x) + p['dt_bias'])
  turn = np.pi * np.tanh(project(p, 'angles', x))
  o, _ = oracles.trapezoidal_scan(
    key('c'),
    key('b'),
    v,
    -np.maximum(softplus(project(p, 'rate', x)), 1e-4) * dt,
    dt,
    sigmoid(project(p, 'right', x)),
    turn[:, :, None] * dt[..., None],
  )
  o = (o + p['skip'] * v) * silu(project(p, 'gate', x))
  return project(p, 'out', o, 2)


def comba(p, x, earlier=False):
  """As in fla, which normalises q, k and p; or with the rule of GDN."""
  q, k, v = (
    convolve(p, f'qkv.convs.{i}', project(p, f'qkv.{name}', x))
    for i, name in enumerate(('query', 'key', 'value'))
  )

  def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)

  strength = sigmoid(p['erase'])[:, None]
  correction = p['correction'][:, None]
  if earlier:
    k = unit(k)
    eraser = strength * k
    q = unit(q) - correction * eraser
  else:
    q = unit(q - correction * strength * k)
    k, eraser = unit(k), unit(strength * k)
  beta = sigmoid(project(p, 'beta', x))
  step = softplus(project(p, 'gate.project', x) + p['gate.dt_bias'])
  alpha = np.exp(-np.exp(p['gate.a_log']) * step)
  o = np.zeros_like(v)
  for b in range(B):
    for n in range(N):
      state = np.zeros((k.shape[-1], v.shape[-1]))
      for t in range(T):
        decayed = alpha[b, t, n] * state
        read = (decayed if earlier else state).T @ eraser[b, t, n]
        update = beta[b, t, n] * (v[b, t, n] - read)
        state = decayed + np.outer(k[b, t, n], update)
        o[b, t, n] = state.T @ q[b, t, n] / np.sqrt(k.shape[-1])
  eps = 1e-6 if earlier else 1e-5
  o = o / np.sqrt((o**2).mean(-1, keepdims=True) + eps) * p['out.norm.scale']
  gate = silu if earlier else sigmoid
  return project(p, 'out.out', o * gate(project(p, 'out.gate', x)), 2)


def xlstm(p, x):
  u = project(p, 'up', x)
  c = convolve(p, 'conv', u)

  def blocks(x, weight):
    y = np.zeros_like(x)
    for n, head in enumerate(weight):
      for i, block in enumerate(head):
        part = slice(4 * i, 4 * i + 4)
        y[:, :, n, part] = x[:, :, n, part] @ block
    return y

  q, k, v = blocks(c, p['query']), blocks(c, p['key']), blocks(u, p['value'])
  qkv = np.concatenate([q, k, v], -1)
  h, _ = oracles.mlstm(
    q,
    k,
    v,
    project(p, 'input_gate', qkv, 2) + p['input_bias'],
    -softplus(-project(p, 'forget_gate', qkv, 2) - p['forget_bias']),
  )
  h = head_norm(p, h) + p['skip'] * c
  return project(p, 'out', h * silu(project(p, 'gate', x)), 2)


def xlstm_7b(p, x):
  def gate(name):
    z = project(p, f'{name}_gate', x) + p[f'{name}_bias']
    return 2 * np.tanh(z / 2)

  h, _ = oracles.mlstm(
    *(project(p, f'qkv.{name}', x) for name in ('query', 'key', 'value')),
    gate('input'),
    -softplus(-gate('forget')),
    eps=0.1,
  )
  h = head_norm(p, h) * sigmoid(project(p, 'gate', x))
  return project(p, 'out', h, 2)


PAPERS = {
  'comba': (comba, {}),
  'gsa': (gsa, dict(num_slots=6)),
  'hgrn2': (hgrn2, dict(lower_bound=0.2)),
  'mamba2': (mamba2, dict(state_dim=6)),
  'mamba3': (mamba3, dict(state_dim=12)),
  'metala': (metala, {}),
  'mlstm': (xlstm, {}),
  'rodimus': (rodimus, dict(state_dim=6)),
  'rwkv5': (rwkv5, {}),
  'rwkv6': (rwkv6, dict(shift_rank=3, decay_rank=5)),
  'xlstm_7b': (xlstm_7b, dict(gate_cap=2.0, eps=0.1, norm_eps=1e-5)),
}


# Of Mamba-2 in Falcon-H1, one option set after another.
FALCON = [
  (mamba2, dict(norm='none', in_bias=True, out_bias=True, conv_bias=False)),
  (
    falcon_h1,
    dict(
      num_heads=6,
      head_dim=5,
      groups=2,
      norm='before_gate',
      dt_min=0.2,
      dt_max=0.6,
      multipliers=FACTORS,
    ),
  ),
]


@pytest.mark.parametrize(
  'name,oracle,options',
  [(name, *PAPERS[name]) for name in sorted(PAPERS)]
  + [('mamba2', *case) for case in FALCON],
)
def test_mixer_is_the_equations_of_its_paper(name, oracle, options):
  mixer = make(name, chunk_size=4, **options)
  x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
  expected = oracle(values(mixer), x.astype(np.float64))
  actual = jax.jit(lambda m, x: m(x)[0])(mixer, x)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  'options,words',
  [
    (dict(groups=3), 'groups=3 does not divide num_heads=4'),
    (dict(multipliers=(1.0, 2.0)), 'must be 5 numbers'),
    (dict(dt_min=0.5, dt_max=0.1), 'dt_max=0.1 is below dt_min=0.5'),
  ],
)
def test_mamba2_refuses(options, words):
  with pytest.raises(ConfigError, match=words):
    build('mamba2', **options)


@pytest.mark.parametrize('name', ['deltanet', 'gated_deltanet', 'kda'])
def test_a_shared_key_head_is_copies_of_it(name):
  widths = dict(key_dim=6, value_dim=10, chunk_size=4)
  copies, shared = make(name, **widths), make(name, key_heads=2, **widths)
  graphdef, params = nnx.split(copies)
  params = jax.tree.map(
    lambda a, b: jnp.repeat(b, 2, a.ndim - 2) if a.shape != b.shape else b,
    params,
    nnx.state(shared),
  )
  x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
  run = jax.jit(lambda m, x: m(x)[0])
  expected = run(nnx.merge(graphdef, params), x)
  np.testing.assert_allclose(run(shared, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'name,key_heads,words',
  [
    ('gated_deltanet', 3, 'key_heads=3 does not divide num_heads=4'),
    ('comba', 2, 'key_heads=2 is not possible for comba'),
  ],
)
def test_key_heads_that_are_refused(name, key_heads, words):
  with pytest.raises(ConfigError, match=words):
    build(name, key_heads=key_heads)


def test_comba_of_earlier_runs():
  mixer = make('comba', chunk_size=4, **formats.IMPLIED[2]['comba'])
  x = np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
  expected = comba(values(mixer), x.astype(np.float64), earlier=True)
  actual = jax.jit(lambda m, x: m(x)[0])(mixer, x)
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max()
  )
  with pytest.raises(ConfigError, match='negative_eigenvalues=True lets'):
    make('comba', negative_eigenvalues=True)


def test_rwkv6_without_its_low_ranks_is_rwkv5():
  five = build('rwkv5')
  six = build('rwkv6')
  # At initialisation the low ranks of rwkv6 are zero, as published.
  for name in ('receptance', 'key', 'value', 'gate', 'out'):
    getattr(six, name).weight[...] = getattr(five, name).weight[...]
  np.testing.assert_array_equal(six.shifts[...][1:5], five.shifts[...])
  x = jax.random.normal(jax.random.key(0), (2, T, D))
  run = jax.jit(lambda m, x: m(x)[0])
  np.testing.assert_allclose(run(six, x), run(five, x), atol=1e-6)


def tokens(seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (jnp.asarray(rng.standard_normal((2, T, N, 4))) for _ in 'qkv')
  log_decay = -jnp.asarray(rng.exponential(0.3, (2, T, N)))
  return q, k, v, log_decay


def test_mamba3_by_eulers_rule_without_rotation_is_mamba2():
  with jax.enable_x64(True):
    q, k, v, log_decay = tokens()
    dt = jnp.exp(log_decay + q[..., 0])
    options = dict(form='chunkwise', chunk_size=4)
    out, _ = trapezoidal_scan(
      q,
      k,
      v,
      log_decay,
      dt,
      jnp.ones_like(dt),
      jnp.zeros_like(q[..., :1]),
      **options,
    )
    expected, _ = linear_attention(
      q, k, dt[..., None] * v, log_decay=log_decay, scale=1, **options
    )
    np.testing.assert_allclose(out, expected, atol=1e-12)


def test_mlstm_with_small_memory_is_gated_linear_attention():
  with jax.enable_x64(True):
    q, k, v, log_decay = tokens()
    gate = log_decay - 6.0  # keeps |n . q| below 1, where nothing divides
    options = dict(form='chunkwise', chunk_size=4)
    out, (c, _, m) = mlstm(q, k, v, gate, log_decay, **options)
    expected, state = linear_attention(
      q, jnp.exp(gate)[..., None] * k, v, log_decay=log_decay, **options
    )
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(c * jnp.exp(m)[..., None, None], state)


@pytest.mark.parametrize('name', ['mamba2', 'mamba3'])
def test_published_initialisation_of_mamba(name):
  mixer = build(name, num_heads=16)
  dt = jax.nn.softplus(mixer.dt_bias[...])
  np.testing.assert_array_less(0.99e-3, dt)
  np.testing.assert_array_less(dt, 0.101)
  assert np.log(dt.max() / dt.min()) > 2
  kept = [mixer.dt_bias, mixer.skip]
  if name == 'mamba2':
    a = np.exp(mixer.a_log[...])
    assert (a >= 1).all() and (a <= 16).all() and np.ptp(a) > 5
    kept.append(mixer.a_log)
  assert not any(p.weight_decay for p in kept)


def test_published_initialisation_of_mlstm():
  mixer = build('mlstm')
  np.testing.assert_allclose(mixer.forget_bias[...], [3, 4, 5, 6])
  for gate in (mixer.input_gate, mixer.forget_gate):
    np.testing.assert_array_equal(gate.weight[...], 0)
  with pytest.raises(ValueError, match='block=3 does not divide'):
    build('mlstm', block=3)


@pytest.mark.parametrize('name', ['rwkv5', 'rwkv6'])
def test_published_decays_of_rwkv(name):
  mixer = build(name)
  decay = mixer.decay[...].reshape(-1)
  assert decay[0] == -6 and abs(decay[-1] + 1) < 1e-6
  np.testing.assert_array_less(0, np.diff(decay))
  assert not mixer.decay.weight_decay


def test_hgrn2_lower_bound_holds():
  # A forget gate that is closed keeps as much as the bound says.
  mixer = build('hgrn2', lower_bound=0.9)
  mixer.forget.weight[...] = -100 * jnp.abs(mixer.forget.weight[...])
  x = jnp.ones((1, 2, D))
  _, one = mixer(x[:, :1], cache=mixer.init_cache(1, 2, 'float32'))
  _, two = mixer(x, cache=mixer.init_cache(1, 2, 'float32'))
  np.testing.assert_allclose(two.state, 1.9 * one.state, rtol=1e-4)
