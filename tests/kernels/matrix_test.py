"""Kernels of matrices: races, and compiling for TPUs that are not there."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from efficient_attn.ops.recurrent.delta_rule import delta_rule
from efficient_attn.ops.recurrent.dplr import dplr
from efficient_attn.ops.recurrent.linear_attention import linear_attention

BATCH, LENGTH, HEADS, WIDTH = 2, 256, 2, 16
# By op and gate.
KERNELS = {
  ('linear', 'scalar'): 'additive.scalar_gate',
  ('linear', 'channel'): 'additive.channel_gate',
  ('delta', 'scalar'): 'delta.scalar_gate',
  ('delta', 'channel'): 'delta.channel_gate',
  ('dplr', 'channel'): 'delta.dplr',
}


@pytest.mark.parametrize('op, gate', KERNELS)
def test_no_races_and_nothing_uninitialised(op, gate):
  """The interpreter that simulates a TPU's memories and copies."""
  interpret = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
  )
  module = importlib.import_module(
    f'efficient_attn.kernels.{KERNELS[op, gate]}'
  )
  rng = np.random.default_rng(0)
  normal = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)  # noqa: E731
  q, k = (normal(BATCH, LENGTH, HEADS, WIDTH) for _ in range(2))
  v, d_out = (normal(BATCH, LENGTH, HEADS, 1, WIDTH) for _ in range(2))
  state, d_last = (normal(BATCH, HEADS, 1, WIDTH, WIDTH) for _ in range(2))
  width = WIDTH if gate == 'channel' else 1
  decay = -jnp.abs(normal(BATCH, LENGTH, HEADS, 1, width))
  starts = jnp.zeros((BATCH, LENGTH), bool).at[:, 70].set(True)
  statics = dict(scale=0.5, operand=jnp.dtype('float32'))
  arrays = [q, k, v]
  if op == 'delta':
    arrays.append(jnp.abs(normal(BATCH, LENGTH, HEADS, 1, 1)) / WIDTH)
  if op == 'dplr':
    arrays = [q, k, k / WIDTH, -k / WIDTH, v]
  if gate == 'channel':
    statics['inclusive'] = True
    if op == 'delta':
      arrays.append(jnp.abs(decay))

  def run(interpret):
    out, last, states = module.forward(
      *arrays, decay, state, starts, dtype=jnp.float32, save=True,
      interpret=interpret, **statics,
    )  # fmt: skip
    return out, last, *module.backward(
      *arrays, decay, starts, states, d_out, d_last,
      interpret=interpret, **statics,
    )  # fmt: skip

  for x, y in zip(run(interpret), run(True), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  assert not races().races_found


def races():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call.races


# T, query and key heads, H, V and dtype of calls of 4 value heads.
SHAPES = {
  'head': (256, 4, 128, 128, jnp.bfloat16),
  'grouped': (300, 2, 64, 128, jnp.bfloat16),
  'one_key_head': (256, 1, 128, 64, jnp.bfloat16),
  'wide': (256, 4, 256, 256, jnp.bfloat16),
  'normalized': (256, 4, 64, 65, jnp.bfloat16),
  'float32': (256, 4, 128, 128, jnp.float32),
  'long': (32768, 4, 64, 64, jnp.bfloat16),
}
TOPOLOGIES = ('v5e:2x2', 'v6e:2x2', 'v4:2x2x1', 'v5p:2x2x1', 'tpu7x:2x2x1')
COMPILED = [
  pytest.param(op, gate, shape, topology, marks=marks)
  for op, gate in KERNELS
  for shape in SHAPES
  for topology in TOPOLOGIES
  for marks in (
    ()
    if (op, shape, topology) == ('linear', 'head', 'v5e:2x2')
    else pytest.mark.in_turn
    if topology == 'v5e:2x2' or shape == 'head'
    else pytest.mark.exhaustive,
  )
]


@functools.cache
def devices(name):
  pytest.importorskip('libtpu')
  return topologies.get_topology_desc(
    platform='tpu', topology_name=name
  ).devices


@pytest.mark.parametrize('op, gate, shape, topology', COMPILED)
def test_compiles_for_tpus(op, gate, shape, topology):
  length, kv_heads, channels, width, dtype = SHAPES[shape]
  mesh = jax.sharding.Mesh(np.array(devices(topology)[:1]), ('chip',))
  leaf = functools.partial(
    jax.ShapeDtypeStruct, sharding=jax.NamedSharding(mesh, jax.P())
  )
  q = leaf((1, length, kv_heads, channels), dtype)
  v = leaf((1, length, 4, width), dtype)
  decay = (1, length, 4) + (channels,) * (gate == 'channel')
  decay = leaf(decay, jnp.float32)
  beta = leaf((1, length, 4), jnp.float32)
  ids = leaf((1, length), jnp.int32)

  def call(q, k, v, decay, beta, ids):
    options = dict(log_decay=decay, segment_ids=ids)
    if op == 'delta':
      return delta_rule(q, k, v, beta, **options)
    if op == 'dplr':
      return dplr(q, k, v, k, -k, **options)
    return linear_attention(q, k, v, **options)

  def both(*args):
    (out, state), pull = jax.vjp(lambda *xs: call(*xs, args[-1]), *args[:-1])
    return out, pull((out, state))

  lowered = jax.jit(both).lower(q, q, v, decay, beta, ids)
  assert lowered.as_text().count('tpu_custom_call') == 2
  lowered.compile()
