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
FORMAT = 2

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
  mixers = dict(mixers)
  for row, implied in _since(IMPLIED, written):
    for name in map(str, (*pattern, *mixers)):
      given = mixers.get(name, {})
      if name.partition(':')[0] == row and isinstance(given, dict):
        mixers[name] = implied | given
  found = {**model, 'mixers': mixers}
  kept = [k for k in model if model[k] != before[k]]
  kept += [k for k in mixers if mixers[k] != before.get('mixers', {}).get(k)]
  if kept:
    _note(f'{source} is of format {written}; as they were: {", ".join(kept)}')
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
