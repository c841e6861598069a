"""Rows that hybrids of several mixers and ffns share."""

import dataclasses

from efficient_attn.interop.table import Row, linear, row

LINEAR = 'linear_attention'


def dense(*names: str) -> tuple[Row, ...]:
  """Returns the rows of dense ffns among mixtures, by alternative names."""
  return tuple(
    found
    for part, axes in (('gate', 'd f'), ('up', 'd f'), ('down', 'f d'))
    for found in (
      row(
        f'glu.{part}.weight',
        '|'.join(f'{name}.{part}_proj.weight' for name in names),
        ' -> '.join((' '.join(axes.split()[::-1]), axes)),
      ),
    )
  )


def of(kind: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
  """Returns rows of the mixers of one kind alone."""
  return tuple(
    dataclasses.replace(
      found, ours=tuple(x.replace('mixer.', f'{kind}.') for x in found.ours)
    )
    for found in rows
  )


def shared(theirs: str) -> tuple[Row, ...]:
  """Returns the rows of the expert that every token has."""
  return (
    *linear('moe.shared.gate', f'{theirs}.gate_proj', 'd', 'f'),
    *linear('moe.shared.up', f'{theirs}.up_proj', 'd', 'f'),
    *linear('moe.shared.down', f'{theirs}.down_proj', 'f', 'd'),
  )


def conv(ours: str, theirs: str) -> Row:
  """Returns the row of the taps of a convolution."""
  return row(f'{ours}.weight', f'{theirs}.weight', '(n h) 1 w -> w n h')
