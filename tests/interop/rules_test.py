"""A rule reads the parameters that it says, and writes the same tensor."""

import numpy as np
import pytest

from efficient_attn.interop.rules import parse

D, N, K, H = 5, 6, 2, 4


def tensor(*shape):
  return np.arange(np.prod(shape)).reshape(shape)


def fused(w):
  """Splits rows [k, (g, 1, 1), h], each group of queries with its key."""
  w = w.reshape(K, N // K + 2, H, D)
  query = w[:, : N // K].reshape(N, H, D)
  return [x.transpose(2, 0, 1) for x in (query, w[:, -2], w[:, -1])]


CASES = {
  'matrix': ('f d -> d f', tensor(N, D), lambda w: [w.T]),
  'heads': (
    '(n h) d -> d n h',
    tensor(N * H, D),
    lambda w: [w.T.reshape(D, N, H)],
  ),
  'out': (
    'd (n h) -> n h d',
    tensor(D, N * H),
    lambda w: [w.T.reshape(N, H, D)],
  ),
  'blocks': (
    '([n] h) d -> d n h',
    tensor((N + 2 * K) * H, D),
    lambda w: [
      x.T.reshape(D, -1, H) for x in np.split(w, [N * H, (N + K) * H])
    ],
  ),
  'in_out': (
    'd ([n] h) -> d n h',
    tensor(D, 3 * N * H),
    lambda w: [x.reshape(D, N, H) for x in np.split(w, 3, 1)],
  ),
  'per head': (
    '(n [x] h) -> n h',
    tensor(N * 3 * H),
    lambda w: list(w.reshape(N, 3, H).swapaxes(0, 1)),
  ),
  'groups': (
    '(k [g] h) d -> d (k g) h, d k h, d k h',
    tensor(K * (N // K + 2) * H, D),
    fused,
  ),
  'neighbours': (
    '(n i 2) d -> d n (2 i)',
    tensor(N * H, D),
    lambda w: [
      np.concatenate([w.T.reshape(D, N, H)[..., i::2] for i in (0, 1)], -1)
    ],
  ),
  'taps': ('c 1 w -> w c', tensor(D, 1, H), lambda w: [w[:, 0].T]),
  'two widths': (
    '[r] d -> d r',
    tensor(N + K, D),
    lambda w: [w[:N].T, w[N:].T],
  ),
  'blocks of heads and of none': (
    '[n h] d -> d n h, d n h, d n, d n',
    tensor(2 * N * H + K + N, D),
    lambda w: [
      w[: N * H].T.reshape(D, N, H),
      w[N * H : 2 * N * H].T.reshape(D, N, H),
      w[2 * N * H : 2 * N * H + K].T,
      w[2 * N * H + K :].T,
    ],
  ),
  'blocks in groups': (
    '(k [r h]) d -> d k h, d (k r) h',
    tensor(K * (H + N // K * 3), D),
    lambda w: [
      w.reshape(K, -1, D)[:, :H].transpose(2, 0, 1),
      w.reshape(K, -1, D)[:, H:].reshape(N, 3, D).transpose(2, 0, 1),
    ],
  ),
  'experts': (
    'e d (f [x]) -> e d f',
    tensor(3, D, 2 * N),
    lambda w: [w[..., ::2], w[..., 1::2]],
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_rule(name):
  text, theirs, split = CASES[name]
  wanted = split(theirs)
  shapes = [x.shape for x in wanted]
  rule = parse(text, len(wanted))
  assert rule.shape(shapes) == theirs.shape
  for i, part in enumerate(wanted):
    np.testing.assert_array_equal(rule.read(theirs, shapes, i), part)
  np.testing.assert_array_equal(rule.write(wanted), theirs)


def test_reading_a_part_copies_nothing():
  theirs = tensor(N * H, D)
  found = parse('(n h) d -> d n h').read(theirs, [(D, N, H)], 0)
  assert np.shares_memory(found, theirs)


def test_parameters_that_are_no_parts_are_refused():
  with pytest.raises(ValueError, match='no parts'):
    parse('(n 2) d -> d (n 2)').shape([(D, 7)])
