"""Fast weights: what they are equal to, and what keeps them from diverging."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.models import cost
from efficient_attn.ops import (
  delta_rule,
  fast_weights,
  large_chunk_fast_weights,
  linear_attention,
)
from efficient_attn.ops.recurrent.muon import orthogonalize
from experiments import page
from experiments.errors import largest
from experiments.exponent import slope
from experiments.survey import oracles
from experiments.survey.claim import (
  Claim,
  Statement,
  holds,
  less,
  statement,
  within,
)
from experiments.survey.sources import OURS

T, N, H, C = 64, 2, 32, 16
# Rates and keys of a linear model, a token a step.
STEPS = {
  'keys as they are, rate 1 (printed)': (False, 1.0),
  'keys as they are, rate 1 / d': (False, 1 / H),
  'keys of length 1, rate 1': (True, 1.0),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
CHUNKS = 32


def normal(seed: int, *shapes) -> list:
  """Normal arrays, float64 where that is enabled."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]


def model(*widths: int) -> tuple:
  """Layers without biases; a single layer begins at zero."""
  sizes = list(zip(widths[:-1], widths[1:], strict=True))
  if len(sizes) == 1:
    return ((jnp.zeros((N, *sizes[0])), None),)
  weights = normal(7, *((N, i, o) for i, o in sizes))
  return tuple(
    (w / i**0.5, None) for w, (i, _) in zip(weights, sizes, strict=True)
  )


def identities() -> dict[str, float]:
  """Relative errors, in float64, from what fast weights are equal to."""
  with jax.enable_x64(True):
    q, k, v = normal(0, *[(1, T, N, H)] * 3)
    rate = jnp.asarray(np.random.default_rng(1).uniform(0, 0.05, (1, T, N)))
    one, mlp = model(H, H), model(H, 2 * H, H)

    def run(weights, size, **options):
      op = functools.partial(fast_weights, chunk_size=size, **options)
      return jax.jit(op)(q, k, v, rate, weights=weights)[0]

    none = jnp.zeros((1, T, N))
    gates = dict(log_decay=none, log_momentum=none - jnp.inf)
    written = rate[..., None] * v
    # What is one by definition, and the ops that it is said of.
    pairs = {
      'DeltaNet': (
        oracles.recurrence(q[0], k[0], v[0], beta=rate[0]),
        run(one, 1),
        delta_rule(q, k, v, rate, scale=1)[0],
      ),
      'linear attention': (
        oracles.recurrence(q[0], k[0], written[0]),
        run(one, T),
        linear_attention(q, k, written, scale=1)[0],
      ),
      'Titans without gates': (
        oracles.descent(q[0], k[0], v[0], rate[0], chunk=C),
        run(one, C),
        run(one, C, **gates),
      ),
    }
    found = {
      name: max(largest(x[0], wanted) for x in ours)
      for name, (wanted, *ours) in pairs.items()
    }
    loop = run(mlp, C, form='recurrent')
    found['TTT-MLP, token by token'] = largest(
      run(mlp, C, form='chunkwise'), loop
    )
    return found


def sequential_steps() -> dict[str, int]:
  """Turns of the longest loop of TTT-MLP over 4096 tokens."""
  x = jax.ShapeDtypeStruct((1, 4096, N, H), jnp.float32)
  rate = jax.ShapeDtypeStruct((1, 4096, N), jnp.float32)
  found = {}
  for form in ('chunkwise', 'recurrent'):
    op = functools.partial(
      fast_weights, weights=model(H, 2 * H, H), chunk_size=C, form=form
    )
    program = str(jax.make_jaxpr(op)(x, x, x, rate))
    found[form] = max(int(n) for n in re.findall(r'length=(\d+)', program))
  return found


def training_exponent() -> float:
  """Of the FLOPs of TTT-Linear with gradients, by length."""
  lengths, found = (1024, 2048, 4096), []
  weights = model(H, H)

  def loss(q, k, v, rate):
    return fast_weights(q, k, v, rate, weights=weights)[0].sum()

  for length in lengths:
    x = jax.ShapeDtypeStruct((1, length, N, H), jnp.float32)
    rate = jax.ShapeDtypeStruct((1, length, N), jnp.float32)
    grad = jax.grad(loss, (0, 1, 2, 3))
    found.append(cost.flops(grad, x, x, x, rate))
  return slope(lengths, found)


def norms_by_step() -> dict[str, list[float]]:
  """|W| of a linear model after each of TOKENS."""
  found = {}
  with jax.enable_x64(True):
    q, k, v = normal(0, *[(1, max(TOKENS), 1, H)] * 3)
    start = ((jnp.zeros((1, H, H)), None),)
    run = jax.jit(functools.partial(fast_weights, chunk_size=1))
    for name, (unit, rate) in STEPS.items():
      keys = k / jnp.linalg.norm(k, axis=-1, keepdims=True) if unit else k
      rates = jnp.full((1, max(TOKENS), 1), rate)
      found[name] = []
      for t in TOKENS:
        arrays = (x[:, :t] for x in (q, keys, v, rates))
        _, state = run(*arrays, weights=start)
        found[name].append(float(jnp.linalg.norm(state.weights[0][0])))
  return found


def norms_by_chunk() -> dict[str, list[float]]:
  """Norms of LaCT's weights over those at the start, chunk by chunk.

  Without normalisation the same step, Muon of the gradient, is added to the
  weights of every chunk.
  """
  size = 16
  weights = [w / H**0.5 for w in normal(3, (1, H, H), (1, H, H), (1, H, H))]
  q, k, v = normal(0, *[(1, CHUNKS * size, 1, H)] * 3)
  rate = jnp.ones((1, size, 1, 3))
  call = jax.jit(functools.partial(large_chunk_fast_weights, chunk_size=size))

  def norm(now):
    before = jnp.linalg.norm(jnp.stack(weights))
    return float(jnp.linalg.norm(jnp.stack(list(now))) / before)

  found = {'with L2 normalisation': [], 'without': []}
  plain, state = tuple(weights), None
  for i in range(CHUNKS):
    span = [x[:, i * size : (i + 1) * size] for x in (q, k, v)]
    if state is None:
      _, state = call(*span, rate, weights=tuple(weights))
    else:
      _, state = call(*span, rate, weights=tuple(weights), initial_state=state)
    found['with L2 normalisation'].append(norm(w[0] for w in state.weights))
    found['without'].append(norm(plain))
    _, fresh = call(*span, rate, weights=plain)
    plain = tuple(
      w + orthogonalize(g[0])
      for w, g in zip(plain, fresh.gradient, strict=True)
    )
  return found


def muon_values() -> list[float]:
  """Least and largest singular value of Muon's step, of ill-matched ones."""
  rng = np.random.default_rng(0)
  low, high = np.inf, 0.0
  for scale in (1e-6, 1, 1e6):
    left, _ = np.linalg.qr(rng.standard_normal((H, H)))
    right, _ = np.linalg.qr(rng.standard_normal((H, H)))
    g = left * np.geomspace(0.05, 1, H) @ right * scale
    values = np.linalg.svd(orthogonalize(jnp.float32(g)), compute_uv=False)
    low, high = min(low, values.min()), max(high, values.max())
  return [float(low), float(high)]


def test_time_training() -> dict:
  """R38."""
  return dict(
    identities=identities(),
    steps=sequential_steps(),
    training=training_exponent(),
    by_step=norms_by_step(),
    by_chunk=norms_by_chunk(),
    muon=muon_values(),
  )


def _same(says: str, about: str, key: str) -> Statement:
  return Statement(
    says=says,
    source=f'{OURS}, on {about}',
    measured=f'{{identities[{key}]:.1e}}'.format_map,
    judge=less('identities', key, than=1e-12),
    rule='both ops to 1e-12 of a loop over tokens, relative, in float64',
  )


_, SMALL, UNIT = STEPS


@statement(
  'TTT-MLP cannot be parallelised',
  'AS p. 42-43',
  'cannot be paralleled',
  rule=f'holds unless mini-batches of {C} tokens, as products, give what the '
  'loop over tokens gives, to 1e-12',
)
def products_do_not_replace_the_loop(v):
  off = v['identities']['TTT-MLP, token by token']
  products, loop = v['steps']['chunkwise'], v['steps']['recurrent']
  text = (
    f'{products} steps of matrix products for 4096 tokens, not {loop}; '
    f'difference {off:.1e}'
  )
  return holds(off >= 1e-12 or products > loop / C), text


@statement(
  'The update as printed makes the weights explode',
  'AS p. 43, on eq. 93',
  'magnitude explosion',
  rule='norm above 1000 after 64 normal tokens of 32 channels, whose values '
  'have a norm of 45 together',
)
def printed_steps_explode(v):
  printed, small, unit = (v['by_step'][name][-1] for name in STEPS)
  text = (
    f'norm after {TOKENS[-1]} tokens: {printed:.1g} as printed, {small:.2g} '
    f'with a rate of 1 / d, {unit:.2g} with keys of length 1'
  )
  return holds(printed > 1e3), text


@statement(
  'A learning rate, or keys of length 1, keep them bounded',
  f'{OURS}, correcting AS p. 42, eq. 92-93',
  rule='norm below 1000 after 64 normal tokens of 32 channels',
)
def small_steps_are_bounded(v):
  small, unit = (v['by_step'][name][-1] for name in (SMALL, UNIT))
  return holds(max(small, unit) < 1e3), f'{small:.2g} and {unit:.2g}'


@statement(
  'L2 normalisation keeps the weights of LaCT stable',
  'AS p. 43',
  rule='1 to 1e-3 with it, more than 2 without',
)
def normalised_weights_keep_their_norm(v):
  kept = v['by_chunk']['with L2 normalisation'][-1]
  plain = v['by_chunk']['without'][-1]
  text = (
    f'norm after {CHUNKS} chunks over that at the start: {kept:.3f} with it, '
    f'{plain:.1f} without'
  )
  return holds(abs(kept - 1) < 1e-3 and plain > 2), text


@statement(
  'Muon makes steps of one size in all directions',
  f'{OURS}, on AS p. 43',
  rule='singular values of 1 to 5 percent, from gradients whose own reach from '
  '0.05 to 1, at three scales',
)
def singular_values_are_one(v):
  low, high = v['muon']
  text = f'singular values of {low:.2f} to {high:.2f}'
  return holds(low > 0.95 and high < 1.05), text


def _plots(values) -> list:
  return [
    page.curves(
      {name: (TOKENS, norms) for name, norms in values['by_step'].items()},
      'tokens',
      'norm of the fast weights',
      f'A linear model of {H} channels, one normal token a step',
      log='y',
    ),
    page.curves(
      {n: (range(CHUNKS), norms) for n, norms in values['by_chunk'].items()},
      'chunks',
      'norm over that at the start',
      f'LaCT, SwiGLU of {H} channels, an update a chunk',
    ),
  ]


R38 = Claim(
  title='Fast weights that learn at test time',
  tier='b',
  measure=test_time_training,
  seeds=(0, 1, 3, 7),
  parts=_plots,
  statements=(
    _same(
      'TTT-Linear with a token a step is DeltaNet',
      'AS p. 42',
      'DeltaNet',
    ),
    _same(
      'One step of gradient descent from zero is linear attention',
      'AS p. 42',
      'linear attention',
    ),
    _same(
      'Titans without decay and momentum is TTT',
      'AS p. 43',
      'Titans without gates',
    ),
    products_do_not_replace_the_loop,
    within(
      'Training TTT-Linear costs O(N), as chunkwise forms do',
      'AS p. 43',
      'aligns with chunk-wise',
      'training',
      0.95,
      1.05,
    ),
    printed_steps_explode,
    small_steps_are_bounded,
    normalised_weights_keep_their_norm,
    singular_values_are_one,
  ),
)

FAST_WEIGHTS = {'R38': R38}
