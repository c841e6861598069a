"""A fingerprint changes with the code that a function reaches, and only so."""

import re

import pytest

from experiments import provenance

PACKAGE = {
  'experiments/claim.py': '''
"""A claim."""
from efficient_attn import ops
from experiments import helpers
from experiments.helpers import twice

LIMIT = 3
UNUSED = 4


def measure():
  """Measures."""
  return twice(LIMIT) + ops.attention(1)


def judge(v):
  return v > helpers.LIMIT
''',
  'experiments/helpers.py': """
LIMIT = 5


def twice(x):
  return 2 * x


def thrice(x):
  return 3 * x
""",
  'efficient_attn/__init__.py': '',
  'efficient_attn/ops/__init__.py': """
from efficient_attn.ops.attention import attention
from efficient_attn.ops.other import other
""",
  'efficient_attn/ops/attention.py': """
def attention(x):
  from efficient_attn.ops.tiles import tiled
  return tiled(x)
""",
  'efficient_attn/ops/tiles.py': 'def tiled(x):\n  return x\n',
  'efficient_attn/ops/other.py': 'def other(x):\n  return x\n',
}


def measure():
  """Stands for the function of PACKAGE."""


@pytest.fixture
def fingerprint(tmp_path, monkeypatch):
  monkeypatch.setattr(provenance, 'ROOT', tmp_path)
  monkeypatch.setattr(measure, '__module__', 'experiments.claim')

  def made(file='', old='', new=''):
    for name, text in PACKAGE.items():
      path = tmp_path / name
      path.parent.mkdir(parents=True, exist_ok=True)
      if name == file:
        assert old in text
        text = text.replace(old, new)
      path.write_text(text)
    for cached in vars(provenance).values():
      if hasattr(cached, 'cache_clear'):
        cached.cache_clear()
    return provenance.fingerprint(measure)

  yield made
  for cached in vars(provenance).values():
    if hasattr(cached, 'cache_clear'):
      cached.cache_clear()


@pytest.mark.parametrize(
  'change',
  [
    ('experiments/claim.py', 'LIMIT = 3', 'LIMIT = 3.5'),
    ('experiments/claim.py', 'twice(LIMIT) +', 'twice(LIMIT) -'),
    ('experiments/helpers.py', '2 * x', '2 + x'),
    ('efficient_attn/ops/attention.py', 'tiled(x)', 'tiled(-x)'),
    ('efficient_attn/ops/tiles.py', 'return x', 'return -x'),
  ],
)
def test_code_that_is_reached_counts(fingerprint, change):
  assert fingerprint(*change) != fingerprint()


@pytest.mark.parametrize(
  'change',
  [
    ('experiments/claim.py', '"""Measures."""', '"""Measures it."""'),
    ('experiments/claim.py', 'LIMIT = 3\n', 'LIMIT = 3  # why\n\n'),
    ('experiments/claim.py', 'UNUSED = 4', 'UNUSED = 5'),
    ('experiments/claim.py', 'v > helpers', 'v < helpers'),
    ('experiments/helpers.py', '3 * x', '4 * x'),
    ('efficient_attn/ops/other.py', 'return x', 'return -x'),
  ],
)
def test_what_is_not_reached_does_not(fingerprint, change):
  assert fingerprint(*change) == fingerprint()


def test_constraints_pin_what_is_installed():
  lines = provenance.constraints().splitlines()
  assert all(re.fullmatch(r'[a-z\d-]+==[\w.]+', line) for line in lines)
  names = [line.partition('==')[0] for line in lines]
  assert {'jax', 'jaxlib', 'flax', 'optax', 'numpy'} <= set(names)
  assert 'efficient-attn' not in names
