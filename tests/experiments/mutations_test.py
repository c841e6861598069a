"""A broken op changes the verdicts that rest on it, in the survey's own words.

Each case breaks one function of the framework, wherever it was imported to,
measures those parts of claims again that call it, and judges them beside the
stored values of the rest.
"""

import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest

from efficient_attn.layers.recurrence import Recurrence
from efficient_attn.ops.recurrent import (
  delta_rule,
  feature_maps,
  linear_attention,
)
from efficient_attn.ops.softmax import attention, paged_attention
from experiments.survey import errata_linear, misprints, run
from experiments.survey.claims import (
  CLAIMS,
  attention_guide,
  fast_weights,
  guide_equations,
  hardware,
  layouts,
  linear_gates,
  random_features,
  recurrences,
)
from experiments.survey.claims import feature_maps as maps

STORED = pathlib.Path(run.__file__).parent / 'results' / 'results.json'


def as_eq_34(x, projection, *, hyperbolic=False):
  """Positive random features with the exponent w . x |x|^2 / 2."""
  if hyperbolic:
    projection = jnp.concatenate([projection, -projection])
  exponent = x @ projection.T * jnp.sum(x * x, -1, keepdims=True) / 2
  return jnp.exp(exponent) / len(projection) ** 0.5


def root_of_the_scale(query, key, value, *, scale=None, **options):
  """Attention whose logits are divided by H^(1/4)."""
  scale = query.shape[-1] ** -0.25 if scale is None else scale
  return attention.attention(query, key, value, scale=scale, **options)


def pages_in_order(query, keys, values, table, lengths, **options):
  """Paged attention that takes the pages of a request as they lie."""
  return paged_attention.paged_attention(
    query, keys, values, jnp.sort(table, 1), lengths, **options
  )


def even_features(x):
  """A Taylor series without its first order."""
  one, square = jnp.ones_like(x[..., :1]), feature_maps.quadratic(x)
  return jnp.concatenate([one, 0 * x, square / 2**0.5], -1)


def gates_twice(query, key, value, *, log_decay=None, **options):
  """Linear attention that decays twice."""
  log_decay = None if log_decay is None else 2 * log_decay
  return linear_attention.linear_attention(
    query, key, value, log_decay=log_decay, **options
  )


def nothing_erased(q, k, v, beta, **options):
  """A delta rule that only adds."""
  return linear_attention.linear_attention(q, k, beta[..., None] * v, **options)


def misprint(name):
  return {name: list(misprints.MISPRINTS[name].errors())}


def taylor_errors():
  found = {}
  for scale in (maps.SCALES[0], 1):
    for name, error in maps.errors(0, scale, features=()).items():
      found.setdefault(name, {})[str(scale)] = [error]
  return found


# What is broken, how, and by claim the part that is measured again and the
# statements whose verdicts must change.
TAYLOR = 'A Taylor series of second order stands for the exponential'
CASES = {
  'positive_random as eq. 34': (
    feature_maps.positive_random,
    as_eq_34,
    {
      'R22': (
        random_features.equations_of_features,
        ['Eq. 34 estimates exp(x . y)', 'Eq. 35 estimates exp(x . y)'],
      ),
      'R16': (
        lambda: misprint('E10'),
        ['With the corrections every equation gives what it should'],
      ),
    },
  ),
  'the scale of attention': (
    attention.attention,
    root_of_the_scale,
    {
      'R07': (
        lambda: hardware.exactness(256),
        ['Tiles give what dense attention gives'],
      ),
      'R11': (
        lambda: dict(invariance=hardware.invariance(0)),
        ['A constant added to all keys does not change attention'],
      ),
      'R14': (
        lambda: dict(error=layouts.read_from_pages(0)),
        ['Paged attention gives what contiguous attention gives'],
      ),
      'R16': (
        lambda: misprint('E8'),
        ['Kv heads are repeated as K (x) 1'],
      ),
      'R44': (
        attention_guide.formula,
        ['Attention is softmax(Q K^T / sqrt(d_k)) V'],
      ),
    },
  ),
  'the pages of paged_attention': (
    paged_attention.paged_attention,
    pages_in_order,
    {
      'R14': (
        lambda: dict(error=layouts.read_from_pages(0)),
        ['Paged attention gives what contiguous attention gives'],
      ),
    },
  ),
  'a feature map': (
    feature_maps.taylor,
    even_features,
    {'R23': (taylor_errors, [TAYLOR])},
  ),
  'a gate': (
    linear_attention.linear_attention,
    gates_twice,
    {
      'R15': (
        lambda: recurrences.forms_agree(['scalar gate']),
        ['All forms of linear attention give the same outputs'],
      ),
      'R16': (
        lambda: misprint('E1'),
        ['A chunk reads the state through the value gates of the chunk before'],
      ),
      'R19': (
        lambda: {'0.9 ours': recurrences.without_overflow(0.9, 256)},
        [
          'The quadratic form with gates works at any length',
          'Chunks with sums of logarithms are right at 4096 tokens',
        ],
      ),
    },
  ),
  'what the delta rule erases': (
    delta_rule.delta_rule,
    nothing_erased,
    {
      'R15': (
        lambda: recurrences.forms_agree(['delta rule']),
        ['All forms of linear attention give the same outputs'],
      ),
      'R16': (
        lambda: misprint('E7'),
        ['The transition of DeltaNet and RWKV-7 multiplies entry by entry'],
      ),
      'R20': (
        lambda: recurrences.writes(0),
        ['The delta rule removes what a key held before'],
      ),
      'R38': (
        lambda: dict(identities=fast_weights.identities()),
        ['TTT-Linear with a token a step is DeltaNet'],
      ),
      'R42': (
        lambda: dict(deltanet=linear_gates.changes('deltanet')),
        ['DeltaNet has a forget and a select gate'],
      ),
      'R46': (
        guide_equations.equations,
        ['The delta rule adds k beta (v - S^T k)^T to the state'],
      ),
    },
  ),
}


@pytest.fixture
def fresh():
  """Nothing that was compiled or kept with another op, before and after."""

  def clear():
    jax.clear_caches()
    errata_linear._gated.cache_clear()

  clear()
  yield
  clear()


def breaks(monkeypatch, original, broken):
  """Puts a broken function where the original was imported."""
  places = [
    (module, name)
    for key, module in list(sys.modules.items())
    if key.startswith(('efficient_attn', 'experiments'))
    for name, value in list(vars(module).items())
    if value is original
  ]
  home = sys.modules[original.__module__]  # the broken one calls it there
  places = [(module, name) for module, name in places if module is not home]
  assert places
  for module, name in places:
    monkeypatch.setattr(module, name, broken)
  for held in gc.get_objects():  # those of mixers hold the op itself
    if isinstance(held, Recurrence) and held.op is original:
      monkeypatch.setitem(vars(held), 'op', broken)


def judged(claim, values, says):
  (statement,) = [s for s in CLAIMS[claim].statements if s.says == says]
  return statement.judge(values)


@pytest.mark.parametrize(
  ('case', 'claim'),
  [
    pytest.param(
      case,
      claim,
      marks=pytest.mark.exhaustive if claim in ('R15', 'R38') else (),
    )
    for case, (*_, claims) in CASES.items()
    for claim in claims
  ],
)
def test_a_broken_op_changes_verdicts(case, claim, monkeypatch, fresh):
  original, broken, claims = CASES[case]
  part, statements = claims[claim]
  stored = json.loads(STORED.read_text())['claims'][claim]['values']
  right = stored | part()
  before = {says: judged(claim, right, says) for says in statements}
  assert before == {says: judged(claim, stored, says) for says in statements}

  jax.clear_caches()
  errata_linear._gated.cache_clear()
  breaks(monkeypatch, original, broken)
  wrong = stored | part()
  after = {says: judged(claim, wrong, says) for says in statements}
  assert all(after[says] != before[says] for says in statements), after
