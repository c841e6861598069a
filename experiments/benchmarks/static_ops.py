"""The ops whose schedules are compared, each with its peers: the one table.

To add a kernel, name it among the implementations of its op.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from efficient_attn import ops
from efficient_attn.ops import masks, scores
from experiments.benchmarks.static_peers import (
  DELTANET,
  SPLASH_CAUSAL,
  SPLASH_WINDOW,
  TOKAMAX_KDA,
  Peer,
)

# The training shape: batch, tokens, heads, channels (values have as many), and
# the states of a channel of Mamba-1, slots and levels. Of a decoder: a query,
# heads of keys, a short and a long cache, pages of 16 tokens and those of the
# short one.
SIZES = dict(
  B=8, T=4096, N=16, H=128, S=16, M=64, L=8, Q=1, K=4, P=4096, X=32768,
  G=16, I=256, J=2048,
)  # fmt: skip
PASSES = ('forward', 'both')  # both: with all gradients
C, H, T = 64, SIZES['H'], SIZES['T']


class Op(NamedTuple):
  """An op at the training shape, or at that of a decoder.

  Attributes:
    call: maps arrays by name and the options of an implementation to the
      output.
    arrays: axes of the arguments by name; those in `FLOAT32` are in float32,
      those in `INT32` whole numbers.
    flops: of a forward pass per token and head.
    implementations: options of `call` by the name of the implementation; 'xla'
      is the form that the others are compared with.
    peers: kernels of other libraries, by name: functions of the same arrays.
    conditions: of kernels by name, see `bundles.read_kernel`.
    out: axes of the output.
    passes: that are measured.
  """

  call: Callable
  arrays: dict[str, str]
  flops: float
  implementations: dict[str, dict] = {'xla': {}}
  peers: dict[str, Peer] = {}
  conditions: dict[str, tuple[float, ...]] = {}
  out: str = 'BTNH'
  passes: tuple[str, ...] = PASSES


FLOAT32 = {
  'log_decay', 'beta', 'input_gate', 'log_forget', 'dt', 'A', 'bonus', 'right',
  'level_scales', 'recurrent',
}  # fmt: skip
INT32 = {'length', 'lengths', 'table'}
QKV = dict(q='BTNH', k='BTNH', v='BTNH')
XLA = {'xla': dict(implementation='xla')}
KERNEL = XLA | {'pallas_tpu': dict(implementation='pallas_tpu')}


def _first(op, **statics):
  """An op without its state."""
  return lambda **arrays: functools.partial(op, **statics)(**arrays)[0]


def _attention(mask):
  return lambda q, k, v, **statics: ops.attention(q, k, v, mask=mask, **statics)


def _decode(keys):
  """One step over a full cache, whose length the program does not know."""

  def call(q, k, v, length, **statics):
    mask = masks.Causal(length - 1)
    return ops.attention(q, k, v, mask=mask, **statics)

  # Of the pieces of 1024 keys, the last has room that nothing sees.
  last = 1024 / SIZES[keys]
  return Op(
    call,
    dict(q='BQNH', k=f'B{keys}KH', v=f'B{keys}KH', length=''),
    4 * SIZES[keys] * H,
    KERNEL,
    conditions=dict(attention_decode=(1 - last, last)),
    out='BQNH',
    passes=('forward',),
  )


# A query reads half of the tokens; within a window, all but those that a short
# past lacks.
PAIRS = T / 2
WINDOW = 1024
WINDOWED = WINDOW - WINDOW**2 / (2 * T)
# Products of chunks of C tokens: scores, their products with the values, and
# what goes into and out of the state.
ADDITIVE = 4 * C * H + 4 * H**2
# The same, keys against keys, a triangular inverse, its products with keys and
# values, and what the state gives them.
DELTA = 2 * C * 5 * H + 6 * H**2 + 4 * C**2 / 3
# Four kinds of scores, an inverse, and two writes to the state.
DPLR = 2 * C * 8 * H + 8 * H**2 + 4 * C**2 / 3

STAGES = ('forward', 'backward')
# A program loads the state at the first of its chunks of 128 tokens.
STATE = {
  f'{name}_{stage}': (128 / T,)
  for name in (
    'scalar_gate', 'channel_gate', 'delta_rule', 'delta_rule_channel', 'dplr',
  )
  for stage in STAGES
}  # fmt: skip
SCANS = {
  f'{name}_{stage}': (128 / T,)
  for name in ('selective_scan', 'diagonal_scan', 'wkv4')
  for stage in STAGES
}

linear = _first(ops.linear_attention, form='chunkwise')
delta = _first(ops.delta_rule, form='chunkwise')
OPS = {
  'attention causal': Op(
    _attention(masks.Causal()),
    QKV,
    4 * PAIRS * H,
    KERNEL,
    {'splash': SPLASH_CAUSAL},
  ),
  'attention window': Op(
    _attention(masks.Window(WINDOW - 1, 0)),
    QKV,
    4 * WINDOWED * H,
    KERNEL,
    {'splash': SPLASH_WINDOW},
  ),
  'attention forget': Op(
    lambda q, k, v, log_forget, **statics: ops.attention(
      q, k, v, mask=masks.Causal(), bias=scores.Forget(log_forget), **statics
    ),
    QKV | dict(log_forget='BTN'),
    4 * PAIRS * H,
    KERNEL,
  ),
  'attention decode': _decode('P'),
  'attention decode long': _decode('X'),
  'attention decode paged': Op(
    lambda q, k, v, table, lengths, **statics: ops.paged_attention(
      q, k, v, table, lengths, **statics
    ),
    dict(q='BQNH', k='JGKH', v='JGKH', table='BI', lengths='B'),
    4 * SIZES['P'] * H,
    KERNEL,
    conditions=dict(attention_decode=(1 - 1 / 16, 1 / 16)),
    out='BQNH',
    passes=('forward',),
  ),
  'linear constant': Op(
    linear, QKV | dict(log_decay='N'), ADDITIVE, KERNEL, conditions=STATE
  ),
  'linear scalar': Op(
    linear, QKV | dict(log_decay='BTN'), ADDITIVE, KERNEL, conditions=STATE
  ),
  'linear channel': Op(
    linear,
    QKV | dict(log_decay='BTNH'),
    ADDITIVE,
    KERNEL,
    {'deltanet-tpu': DELTANET['chunk_gla']},
    STATE,
  ),
  'delta': Op(
    delta,
    QKV | dict(beta='BTN'),
    DELTA,
    KERNEL,
    {'deltanet-tpu': DELTANET['chunk_delta_rule']},
    STATE,
  ),
  'delta scalar': Op(
    delta,
    QKV | dict(beta='BTN', log_decay='BTN'),
    DELTA,
    KERNEL,
    {'deltanet-tpu': DELTANET['chunk_gdn']},
    STATE,
  ),
  'delta channel': Op(
    delta,
    QKV | dict(beta='BTN', log_decay='BTNH'),
    DELTA,
    KERNEL,
    {'deltanet-tpu': DELTANET['chunk_kda'], 'tokamax': TOKAMAX_KDA},
    STATE,
  ),
  'dplr': Op(
    _first(ops.dplr, form='chunkwise'),
    QKV | dict(a='BTNH', b='BTNH', log_decay='BTNH'),
    DPLR,
    KERNEL,
    conditions=STATE,
  ),
  'mlstm': Op(
    _first(ops.mlstm, form='chunkwise'),
    QKV | dict(input_gate='BTN', log_forget='BTN'),
    ADDITIVE,
    XLA,
  ),
  'gated_slot_attention': Op(
    _first(ops.gated_slot_attention, form='chunkwise'),
    QKV | dict(log_decay='BTNM'),
    2 * (2 * C * (H + SIZES['M']) + 4 * H * SIZES['M']),
    XLA,
  ),
  # A state of one number or S per channel: multiplications and additions.
  'selective_scan': Op(
    _first(ops.selective_scan),
    dict(x='BTNH', dt='BTNH', A='NHS', B='BTS', C='BTS'),
    6 * H * SIZES['S'],
    KERNEL,
    conditions=SCANS,
  ),
  'diagonal_scan': Op(
    _first(ops.diagonal_scan),
    dict(x='BTNH', log_decay='BTNH'),
    2 * H,
    KERNEL,
    conditions=SCANS,
  ),
  'wkv4': Op(
    _first(ops.wkv4),
    dict(k='BTNH', v='BTNH', log_decay='NH', bonus='NH'),
    8 * H,
    KERNEL,
    conditions=SCANS,
  ),
}
