"""The rows of a family's table: which parameters are which tensor, and how."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """One bijection; see `rules` for `rule`.

  Attributes:
    ours: names of parameters, of a block those inside it. A part 'mixer' or
      'ffn' may be a row of MIXERS or FFNS in its place, for layers of that one
      alone.
    theirs: name of the tensor; names by which it went before follow a '|'.
      {i} is the layer, {e} an index of the first axis of ours, as of experts,
      which have a tensor each; other letters are those of `Family.indices`.
    rule: of one tensor; letters in braces are numbers of `Family.indices`.
  """

  ours: tuple[str, ...]
  theirs: str
  rule: str


def row(ours: str | tuple[str, ...], theirs: str, rule: str = 'd -> d') -> Row:
  """Returns a row; by default of a vector."""
  return Row((ours,) if isinstance(ours, str) else ours, theirs, rule)


def linear(
  ours: str | tuple[str, ...],
  theirs: str,
  inputs: str,
  outputs: str,
  *,
  rows: str = '',
  transposed: bool = False,
) -> tuple[Row, Row]:
  """Returns the rows of the weight and of the bias of a projection.

  Either row is of no account to models that lack the parameter.

  Args:
    ours: names of projections.
    theirs: name of the layer of the file.
    inputs: axes that ours contract, in order.
    outputs: axes behind them; for several of ours forms with commas between.
    rows: order of the outputs in the file, where it is another.
    transposed: whether the file has [in, out], as of GPT-2, not [out, in].
  """
  names = (ours,) if isinstance(ours, str) else ours
  out, into = f'({rows or outputs})', f'({inputs})'
  matrix = f'{into} {out}' if transposed else f'{out} {into}'
  forms = [form.strip() for form in outputs.split(',')]
  weights = ', '.join(f'{inputs} {form}' for form in forms)
  return (
    Row(
      tuple(f'{name}.weight' for name in names),
      f'{theirs}.weight',
      f'{matrix} -> {weights}',
    ),
    Row(
      tuple(f'{name}.bias' for name in names),
      f'{theirs}.bias',
      f'{out} -> {", ".join(forms)}',
    ),
  )


def norm(ours: str, theirs: str) -> tuple[Row, Row]:
  """Returns the rows of the scale of a norm and of its bias."""
  return row(f'{ours}.scale', f'{theirs}.weight'), row(
    f'{ours}.bias', f'{theirs}.bias'
  )
