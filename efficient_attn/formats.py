"""The formats of config.json, and the meaning of what older ones leave out.

A method whose defaults change keeps its earlier function as values of its
options: a row here names them, and a run saved before the change reads them in
place of today's defaults, so that its checkpoint means what it meant. A value
that means something else today has another name since.
"""

import functools
import logging
from collections.abc import Mapping
from typing import Any

# Rises when a config saved by the version before would mean something else.
FORMAT = 4

# Format -> mixer -> the options that earlier formats imply.
IMPLIED: dict[int, dict[str, dict[str, Any]]] = {
  2: {
    'comba': dict(rule='gated_delta', output_gate='silu', norm_eps=1e-6),
    'cosformer': dict(max_length=4096),
    'deltanet': dict(norm_eps=1e-6),
    'deltaproduct': dict(norm_eps=1e-6),
    'gated_deltanet': dict(norm_eps=1e-6),
    'gla': dict(norm_eps=1e-6),
    'hgrn': dict(norm_eps=1e-6),
    'lact': dict(rank=0, rotary_base=10_000.0, tuned_muon=False, norm_eps=1e-6),
    'lightning': dict(rates='linear', silu_values=False, norm_scale=False),
    'mesa': dict(norm_eps=1e-6),
    'rebased': dict(norm_eps=1e-6),
    'retention': dict(norm_eps=1e-6),
    'slstm': dict(shared_norm=True),
    'ttt_linear': dict(mean_gradient=False, gate=True),
    'ttt_mlp': dict(mean_gradient=False, gate=True),
  },
}

# The rows whose attention is composed of parts.
ATTENTION = (
  'attention', 'window', 'differential', 'sparse_transformer', 'logsparse',
  'star', 'blockbert', 'cascade', 'longformer', 'bigbird', 'neighborhood',
  'adaptive_span', 'entmax', 'dam', 'duo', 'moa', 'sliding_tile', 'radial',
  'additive', 'luong',
)  # fmt: skip

# Format -> mixer -> option that earlier formats had -> what it is now: an
# option of a part, or '' where the model knows it.
POSITIONS = {
  'rotary_base': 'rotary.base',
  'rotary_fraction': 'rotary.fraction',
  't5_buckets': 't5.buckets',
  't5_distance': 't5.distance',
}
MOVED: dict[int, dict[str, dict[str, str]]] = {
  3: dict.fromkeys(ATTENTION, POSITIONS)
  | {
    'neighborhood': {**POSITIONS, 'grid': ''},
    'sliding_tile': {**POSITIONS, 'grid': ''},
    'radial': {**POSITIONS, 'frame_size': ''},
    'vsa': {'grid': ''},
  },
  4: {'mla': {'rotary_base': 'rotary.base'}},
}

# Parameters (part, name) of a mixer that had no part before.
OF_PARTS = {
  ('mask_rule', 'span'),
  ('weights', 'alpha'),
  ('weights', 'lambda_k1'),
  ('weights', 'lambda_k2'),
  ('weights', 'lambda_q1'),
  ('weights', 'lambda_q2'),
  ('weights', 'norm'),
  ('weights', 'params'),
  ('weights', 'sinks'),
}

# Format -> what earlier formats called a mixer -> its name.
MIXER_NAMES: dict[int, dict[str, str]] = {
  3: {'lambda': 'lambda_network', 'sla': 'slab'},
}

# Format -> key of the model -> what earlier formats called a value -> its name.
RENAMED: dict[int, dict[str, dict[str, str]]] = {
  2: {'activation': {'gelu': 'gelu_tanh'}},
}


def upgrade(
  model: Mapping[str, Any], written: int, source: str
) -> dict[str, Any]:
  """Returns the group `model` of a config of format `written` as of today.

  Says once of each `source`, a file, what keeps a meaning that is not today's.
  Values of the wrong form stay as they are: whoever reads them says so.
  """
  before, model = model, dict(model)
  for key, names in _since(RENAMED, written):
    if isinstance(model.get(key), str):
      model[key] = names.get(model[key], model[key])
  mixers = model.get('mixers', {})
  pattern = model.get('pattern', ('attention',))
  if not isinstance(mixers, dict) or not isinstance(pattern, (list, tuple)):
    return model
  names = dict(_since(MIXER_NAMES, written))
  if any(_row(str(name)) in names for name in (*pattern, *mixers)):
    pattern = tuple(_named(name, names) for name in pattern)
    model['pattern'] = pattern
    mixers = {_named(name, names): given for name, given in mixers.items()}
  mixers = dict(mixers)
  for row, implied in _since(IMPLIED, written):
    for name in map(str, (*pattern, *mixers)):
      given = mixers.get(name, {})
      if _row(name) == row and isinstance(given, dict):
        mixers[name] = implied | given
  for row, options in _since(MOVED, written):
    for name, given in mixers.items():
      if _row(name) == row and isinstance(given, dict):
        mixers[name] = _move(given, options)
  found = {**model, 'mixers': mixers}
  kept = [k for k in model if model[k] != before.get(k)]
  kept += [k for k in mixers if mixers[k] != before.get('mixers', {}).get(k)]
  if kept:
    _note(f'{source} is of format {written}; as they were: {", ".join(kept)}')
  return found


def _row(name: str) -> str:
  return name.partition(':')[0]


def _named(name, names):
  """Returns a name of a pattern, such as 'sla:far', with that of today."""
  if not isinstance(name, str):
    return name
  row, *place = name.split(':', 1)
  return ':'.join([names.get(row, row), *place])


def _move(given, options):
  """Returns the options of a mixer under the names of today."""
  found = dict(given)
  for old, new in options.items():
    if old in found:
      value, (part, _, name) = found.pop(old), new.partition('.')
      if part:
        found[part] = {**found.get(part, {}), name: value}
  return found


def renamed(mixer: str) -> str | None:
  """Returns today's name of a mixer that had another; None if it had not."""
  found = (names.get(mixer) for names in MIXER_NAMES.values())
  return next(filter(None, found), None)


def moved(row: str, option: str) -> str | None:
  """Says where an option of a mixer has gone; None if it was never there."""
  for rows in MOVED.values():
    new = rows.get(row, {}).get(option)
    if new is not None:
      return f'it is {new} now' if new else 'the model hands its grid down'
  return None


def without_parts(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns parameters, nested, under the names that they had before parts."""
  found = {}
  for key, value in params.items():
    if isinstance(value, dict):
      names = [n for n in value if (key, n) in OF_PARTS]
      found |= {n: value[n] for n in names}
      value = without_parts({n: v for n, v in value.items() if n not in names})
      if names and not value:
        continue
    found[key] = value
  return found


@functools.cache  # a run reads its file several times
def _note(text: str) -> None:
  logging.getLogger('efficient_attn').warning(text)


def changed(key: str) -> bool:
  """Tells if a key such as 'model.activation' has had another meaning."""
  _, *parts = key.split('.')
  if len(parts) == 3 and parts[0] == 'mixers':
    row, option = parts[1].partition(':')[0], parts[2]
    return any(option in rows.get(row, {}) for rows in IMPLIED.values())
  return any(parts == [k] for keys in RENAMED.values() for k in keys)


def _since(table, written):
  for version, rows in sorted(table.items()):
    if version > written:
      yield from rows.items()
