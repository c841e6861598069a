"""Weights in few bits: codes as printed, sizes with scales, and the loss."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn import models
from efficient_attn.compress.quantize import FORMATS, quantized, stored_bytes
from efficient_attn.ops.softmax.fake_quant import fake_quant
from experiments import page
from experiments.ablations import report
from experiments.survey.claim import (
  DERIVED,
  RESTATED,
  UNDEFINED,
  Claim,
  elsewhere,
  equals,
  holds,
  listed,
  statement,
  within,
)
from experiments.survey.models import SEVEN_B, parameters
from experiments.survey.sources import OURS
from experiments.survey.trained import language_model, losses, texts

TEXTS = 64  # whose losses are compared
RANGES = ((-0.3, 2.0), (0.5, 3.0))
FORMS = {
  'FP16': 'float16',
  'INT8': 'int8',
  'INT4': 'int4',
  'INT4 with zero points': 'uint4',
}


def printed(weights: np.ndarray, bits=8) -> tuple[np.ndarray, np.ndarray]:
  """Codes and values of FL eqs. 10-11: round(W / s + z), and back."""
  step = (weights.max() - weights.min()) / (2**bits - 1)
  zero = np.round(weights.min() / step)
  codes = np.round(weights / step + zero)
  return codes, step * (codes - zero)


def codes_of(weights: np.ndarray) -> np.ndarray:
  """The codes of the framework's uint8, read off its values."""
  values = np.asarray(fake_quant(jnp.asarray(weights), 'uint8', (None,)))
  step = (weights.max() - weights.min()) / 255
  return np.round((values - weights.min()) / step)


def equations() -> dict:
  """Ranges of codes, and errors in steps, on uniform weights."""
  found = {}
  for i, (low, high) in enumerate(RANGES):
    weights = np.random.default_rng(0).uniform(low, high, 100_000)
    weights = weights.astype(np.float32)
    step = (weights.max() - weights.min()) / 255
    codes, values = printed(weights)
    ours = codes_of(weights)
    found[f'printed codes {i}'] = [int(codes.min()), int(codes.max())]
    found[f'codes {i}'] = [int(ours.min()), int(ours.max())]
    found[f'printed error {i}'] = float(np.abs(values - weights).max() / step)
    cut = values + step * (np.clip(codes, 0, 255) - codes)
    found[f'cut error {i}'] = float(np.abs(cut - weights).max() / step)
    ours = fake_quant(jnp.asarray(weights), 'uint8', (None,))
    found[f'error {i}'] = float(jnp.abs(ours - weights).max() / step)
  found['printed error'] = max(
    found['printed error 0'], found['printed error 1']
  )
  return found


def bits(form: str) -> int:
  """Bits that tell apart the values of one group in a format."""
  if not form:
    return jnp.finfo(jnp.float16).bits
  x = jax.random.normal(jax.random.key(0), (100_000,))
  values = fake_quant(x, form, (None,))
  return math.ceil(math.log2(len(jnp.unique(values))))


def costs() -> dict:
  """Percent more bits per byte of a trained model, by format of its weights."""
  model, tokens = language_model(), texts(256, TEXTS)
  full = losses(model, tokens).mean(1)
  found = {'FP32 bits per byte': float(full.mean() / math.log(2))}
  for name, form in FORMS.items():
    more = 100 * (losses(quantized(model, form), tokens).mean(1) / full - 1)
    found[f'{name} cost'], found[f'{name} cost +-'] = report.interval(
      more.tolist()
    )
  return found


def measure() -> dict:
  """R33: codes as printed, sizes of a 7B decoder and losses of a small one."""
  found = equations() | costs()
  decoder = models.abstract(SEVEN_B)
  full = 4 * parameters(decoder)
  found['FP32'] = full / 1e9
  for name, form in FORMS.items():
    whole = stored_bytes(decoder, form)
    less = stored_bytes(decoder, form, embeddings=False)
    found |= {
      f'{name} GB': whole / 1e9,
      f'{name} bits': bits(FORMATS[form].form),
      f'{name} ratio': full / whole,
      f'{name} ratio without embeddings': full / less,
    }
  found['FP16 to INT4'] = found['INT4 ratio'] / found['FP16 ratio']
  return found


def _table(v) -> list:
  rows = [
    [
      name,
      v[f'{name} bits'],
      FORMATS[form].group or 'output channel',
      v[f'{name} GB'],
      v[f'{name} ratio'],
      v[f'{name} ratio without embeddings'],
      f'{v[f"{name} cost"]:.2f} ± {v[f"{name} cost +-"]:.2f}',
    ]
    for name, form in FORMS.items()
  ]
  head = [
    'format',
    'bits of a code',
    'weights in a group',
    'GB',
    'times less than FP32',
    'with embeddings in 16 bits',
    '% more bits per byte',
  ]
  return [
    page.Table(head, rows),
    page.Text(
      f'A decoder of {v["FP32"] / 4:.2f}B parameters with its scales: 32 bits '
      'an output channel (INT8), 16 bits a group (INT4), and as many for zero '
      'points; vectors in 16 bits. Bits per byte are those of a small language '
      f'model, {v["FP32 bits per byte"]:.3f} in 32 bits, with the interval of '
      f'the difference over {TEXTS} texts.',
      note=True,
    ),
  ]


def _ranges(codes) -> str:
  return listed('{} for weights in {}', codes, map(list, RANGES), by=' and ')


@statement(
  'The equations give codes of N bits',
  'FL p. 11, eqs. 10-11',
  '0 to 2^N - 1',
  rule='all codes in 0 to 255',
  provenance=DERIVED,
)
def printed_codes_have_eight_bits(v):
  codes = [v[f'printed codes {i}'] for i in range(len(RANGES))]
  verdict = holds(all(0 <= low <= high < 256 for low, high in codes))
  return verdict, f'{_ranges(codes)} at 8 bits'


@statement(
  'With the zero point subtracted they do',
  f'{OURS}, correcting FL p. 11, eqs. 10-11',
  rule='codes in 0 to 255 and errors of half a step',
)
def corrected_codes_have_eight_bits(v):
  codes, errors, cut = (
    [v[f'{what} {i}'] for i in range(len(RANGES))]
    for what in ('codes', 'error', 'cut error')
  )
  text = (
    f'{_ranges(codes)}; errors {errors[0]:.3f} and {errors[1]:.3f} steps, '
    f'where eqs. 10-11 cut to 8 bits give {cut[0]:.0f} and {cut[1]:.0f}'
  )
  right = all(span == [0, 255] for span in codes)
  return holds(right and all(x < 0.501 for x in errors)), text


@statement(
  'INT4 costs about 5 percent of quality',
  'S003 Quantization',
  '~5%',
  rule='no metric, model or data is stated; restated if 5 lies in the interval '
  f'of a small language model on {TEXTS} texts, its weights rounded to the '
  'nearest',
)
def interval_has_five_percent(v):
  text = (
    '{INT4 cost:.2f} ± {INT4 cost +-:.2f} % more bits per byte, with INT8 '
    '{INT8 cost:.2f} ± {INT8 cost +-:.2f} %'
  ).format_map(v)
  near = abs(v['INT4 cost'] - 5) <= v['INT4 cost +-']
  return RESTATED if near else UNDEFINED, text


_size = functools.partial(equals, tolerance=0.05, unit='x')


R33 = Claim(
  title='Weights in few bits',
  tier='b',
  measure=measure,
  seeds=(0,),
  parts=_table,
  statements=(
    printed_codes_have_eight_bits,
    corrected_codes_have_eight_bits,
    within(
      'Weights come back to half a step, whatever the codes',
      f'{OURS}, on FL p. 11, eq. 10',
      '',
      'printed error',
      0.49,
      0.501,
      unit='steps',
      provenance=DERIVED,
    ),
    _size('FP16 halves the size', 'FLR Quantization', '2x', 'FP16 ratio', 2),
    _size(
      'INT8 takes a quarter of FP32',
      'FL p. 11; FLR Quantization',
      '4x',
      'INT8 ratio',
      4,
    ),
    _size(
      'INT4 takes an eighth of FP32', 'FLR Quantization', '8x', 'INT4 ratio', 8
    ),
    _size(
      'INT4 takes a quarter of FP16',
      'S003 Quantization',
      '4x',
      'FP16 to INT4',
      4,
    ),
    interval_has_five_percent,
    elsewhere(
      'INT8 is 2 to 4 times as fast, INT4 4 to 8 times',
      'FLR Quantization',
      '2-4x, 4-8x',
      'kernels for products of 8 and 4 bits',
    ),
    elsewhere(
      'Product quantisation makes a model 25 times smaller, of 14 MB',
      'FL p. 11',
      '25x',
      'the original model',
    ),
  ),
)

QUANTIZATION = {'R33': R33}
