"""Finds the tensor of a file for each parameter, by a family's table."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from efficient_attn.config import ConfigError, ModelConfig
from efficient_attn.interop.family import Family
from efficient_attn.interop.files import Tensor
from efficient_attn.interop.rules import Rule, Shape, parse
from efficient_attn.interop.table import Row
from efficient_attn.layers.layout import unstack
from efficient_attn.layers.stack import row_of

_LAYER = re.compile(r'(stack\.layers\.(\d+)\.)(.+)')


class Piece(NamedTuple):
  """A parameter of a single layer, or one expert of it.

  Attributes:
    name: as of `layers.layout.unstack`.
    expert: place on its first axis; None: all of it.
  """

  name: str
  expert: int | None = None


@dataclasses.dataclass(frozen=True)
class Transfer:
  """A tensor and the pieces that it holds.

  Attributes:
    names: of the tensor, the first of which is written.
    rule: how it holds them.
    pieces: in the order of the rule.
    shapes: theirs.
  """

  names: tuple[str, ...]
  rule: Rule
  pieces: tuple[Piece, ...]
  shapes: tuple[Shape, ...]

  @property
  def shape(self) -> Shape:
    """The shape of the tensor."""
    return self.rule.shape(self.shapes)


class Plan:
  """The tensors of a model, and where each parameter is.

  Args:
    family: of the model.
    config: of the model.
    params: shapes of its parameters by name.

  Attributes:
    transfers: all of them; several may be of one tensor, which blocks share.
    places: the transfer of each piece, and its place in that.
  """

  def __init__(
    self, family: Family, config: ModelConfig, params: Mapping[str, Any]
  ):
    self._family, self._config = family, config
    single = jax.eval_shape(unstack, params)
    self._shapes = {name: x.shape for name, x in single.items()}
    self._indices = family.indices(config)
    self._ends, self._blocks = map(_by_name, (family.ends, family.blocks))
    self.places: dict[Piece, tuple[Transfer, int]] = {}
    self.transfers: list[Transfer] = []
    for name in self._shapes:
      self._add(name)

  def _add(self, name):
    """Adds the tensors that hold a parameter, unless they are there."""
    row, layer, ours = self._row(name)
    experts = range(self._shapes[name][0]) if '{e}' in row.theirs else [None]
    letters, block = {}, ''
    if layer is not None:
      letters = {k: v[layer] for k, v in self._indices.items()}
      block = self._family.block
    for e in experts:
      if Piece(name, e) in self.places:
        continue
      names = tuple(
        (block + x).format(i=layer, e=e, **letters)
        for x in row.theirs.split('|')
      )
      pieces = tuple(Piece(x, e) for x in ours)
      shapes = tuple(self._shapes[x][e is not None :] for x in ours)
      rule = parse(row.rule.format(**letters), len(ours))
      transfer = Transfer(names, rule, pieces, shapes)
      self.transfers.append(transfer)
      self.places |= {piece: (transfer, i) for i, piece in enumerate(pieces)}

  def _row(self, name) -> tuple[Row, int | None, tuple[str, ...]]:
    """Returns the row of a parameter, its layer, and all names of the row."""
    found, layer, base = self._ends.get(name), None, ''
    if place := _LAYER.fullmatch(name):
      base, layer, rest = place[1], int(place[2]), place[3]
      part, _, tail = rest.partition('.')
      own = f'{self._kinds(layer).get(part, part)}.{tail}'
      found = self._blocks.get(own) or self._blocks.get(rest)
    if found is None:
      raise ConfigError(
        f'{self._family.architecture} has no tensor for the parameter {name}; '
        'models of this format have no such part'
      )
    ours = found.ours
    if place and own in found.ours:
      kind = own.partition('.')[0]
      ours = (re.sub(f'^{kind}(?=[.])', part, x) for x in ours)
    return found, layer, tuple(base + x for x in ours)

  def _kinds(self, layer):
    """Returns the rows of the mixer and the ffn of a layer."""
    mixer, ffn = self._config.layers[layer]
    return {'mixer': row_of(mixer), 'ffn': row_of(ffn)}

  def find(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensor of each transfer, by the first of its names.

    Raises:
      ConfigError: one is missing, of another shape, or no model has it.
    """
    found, missing, used = {}, [], set()
    for transfer in self.transfers:
      name = self._family.named(transfer.names, tensors)
      if name is None:
        missing.append(transfer.names[0])
        continue
      used.add(name)
      found[transfer.names[0]] = tensors[name]
      if tensors[name].shape != transfer.shape:
        raise ConfigError(
          f'{tensors[name].path}: {name} is {list(tensors[name].shape)}, but '
          f'config.json makes it {list(transfer.shape)}'
        )
    if missing:
      raise ConfigError(f'{_some(missing)} missing')
    extra = [name for name in tensors if name not in used
             and not any(fnmatch.fnmatchcase(name, x)
                         for x in self._family.skip)]  # fmt: skip
    if extra:
      raise ConfigError(f'{_some(extra)} not part of the model of config.json')
    return found


def _some(names):
  names = sorted(names)
  verb = 'is' if len(names) == 1 else f'and {len(names) - 1} more tensors are'
  return f'the tensor {names[0]} {verb}'


def _by_name(rows):
  return {name: row for row in rows for name in row.ours}
