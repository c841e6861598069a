"""Calls of the elementwise recurrences and what they should give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops.recurrent.diagonal_scan import diagonal_scan
from efficient_attn.ops.recurrent.selective_scan import selective_scan
from efficient_attn.ops.recurrent.slstm import slstm
from efficient_attn.ops.recurrent.wkv4 import wkv4
from tests.oracles import elementwise as oracles

CHUNK = 4
BATCH, HEADS, CHANNELS, STATES = 2, 2, 3, 2

# name: (op, options)
CASES = {
  'bidirectional': (diagonal_scan, {'bidirectional': True}),
  'constant': (diagonal_scan, {}),
  'diagonal': (diagonal_scan, {}),
  'euler': (selective_scan, {}),
  'slstm': (slstm, {}),
  'wkv4': (wkv4, {}),
  'zoh': (selective_scan, {'discretization': 'zoh'}),
}
FORMS = {
  name: ('recurrent',) if op is slstm else ('recurrent', 'chunkwise', None)
  for name, (op, _) in CASES.items()
}


def make(name, length, *, seed=0, batch=BATCH, dtype=np.float64, state=True):
  """Arrays (a dict) and segment ids with boundaries everywhere."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(dtype)  # noqa: E731
  heads = HEADS, CHANNELS
  tokens, memory = (batch, length, *heads), (batch, *heads)
  if name in ('bidirectional', 'constant', 'diagonal'):
    gate = heads if name == 'constant' else tokens
    arrays = {
      'x': draw(*tokens),
      'log_decay': -rng.exponential(0.3, gate).astype(dtype),
      'initial_state': draw(*memory),
    }
  elif name in ('euler', 'zoh'):
    arrays = {
      'x': draw(*tokens),
      'dt': rng.exponential(0.5, tokens).astype(dtype),
      'A': -rng.exponential(1.0, (*heads, STATES)).astype(dtype),
      'B': draw(batch, length, STATES),
      'C': draw(batch, length, STATES),
      'D': draw(*heads),
      'initial_state': draw(*memory, STATES),
    }
  elif name == 'wkv4':
    arrays = {
      'k': draw(*tokens),
      'v': draw(*tokens),
      'log_decay': -rng.exponential(0.3, heads).astype(dtype),
      'bonus': draw(*heads),
      'initial_state': (draw(*memory), np.exp(draw(*memory)), draw(*memory)),
    }
  else:
    arrays = {key: draw(*tokens) for key in 'zifo'}
    arrays['recurrent'] = draw(4, *heads, CHANNELS)
    arrays['bias'] = draw(4, *heads)
    h, c, m = (draw(*memory) for _ in range(3))
    arrays['initial_state'] = h, c, np.exp(draw(*memory)), m
  if name == 'bidirectional' or not state:
    del arrays['initial_state']
  # One-token segments and ids that come back.
  ids = np.cumsum(rng.random((batch, length)) < 0.25, axis=1) % 3
  return arrays, ids.astype(np.int32)


def call(name, arrays, **options):
  """The op, with its state free of stabilisers."""
  op, given = CASES[name]
  if op is not slstm:
    options.setdefault('chunk_size', CHUNK)
  out, state = op(**arrays, **given, **options)
  return out, plain(name, state)


def plain(name, state):
  if name == 'wkv4':
    num, den, top = state
    return num * jnp.exp(top), den * jnp.exp(top)
  if name == 'slstm':
    h, c, n, top = state
    return h, c * jnp.exp(top), n * jnp.exp(top)
  return state


def expected(name, arrays, segment_ids=None):
  op, given = CASES[name]
  oracle = getattr(oracles, op.__name__)
  return oracle(**arrays, **given, segment_ids=segment_ids)


@functools.partial(jax.jit, static_argnames=('name', 'form'))
def vjp(name, arrays, cotangents, segment_ids, form):
  """Output, state and the gradient of every array."""

  def run(arrays):
    return call(name, arrays, segment_ids=segment_ids, form=form)

  result, pull = jax.vjp(run, arrays)
  return *result, pull(cotangents)[0]


def assert_close(actual, wanted, tolerance):
  actual, wanted = jax.tree.leaves(actual), jax.tree.leaves(wanted)
  assert len(actual) == len(wanted)
  for x, y in zip(actual, wanted, strict=True):
    assert x.shape == y.shape
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max())
    )


def to_jax(tree):
  return jax.tree.map(jnp.asarray, tree)


@functools.cache
def reference(name, length):
  """Arrays, ids, cotangents and float64 results of a case, all checked.

  The output and the state are those of the numpy loops; the gradients are
  autodiff of the recurrent form in float64, of which every array's is checked
  against central differences of the numpy loops.
  """
  arrays, ids = make(name, length)
  results = expected(name, arrays, ids)
  rng = np.random.default_rng(1)
  cotangents = jax.tree.map(lambda x: rng.standard_normal(x.shape), results)
  with jax.enable_x64(True):
    out, state, grads = vjp(
      name, to_jax(arrays), to_jax(cotangents), jnp.asarray(ids), 'recurrent'
    )
    grads = jax.tree.map(np.asarray, grads)
  assert_close((out, state), results, 1e-12)

  leaves, treedef = jax.tree.flatten(arrays)
  for at, (leaf, grad) in enumerate(
    zip(leaves, jax.tree.leaves(grads), strict=True)
  ):
    direction = rng.standard_normal(leaf.shape)

    def loss(step, at=at, direction=direction):
      moved = [*leaves]
      moved[at] = moved[at] + step * direction
      moved = expected(name, jax.tree.unflatten(treedef, moved), ids)
      pairs = zip(
        jax.tree.leaves(moved), jax.tree.leaves(cotangents), strict=True
      )
      return sum(np.vdot(x, y) for x, y in pairs)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(
      np.vdot(grad, direction), slope, rtol=1e-6, atol=1e-7
    )
  return arrays, ids, cotangents, (*results, grads)
