"""The formats of config.json, and the meaning of what older ones leave out.

A method whose defaults change keeps its earlier function as values of its
options: a row here names them, and a run saved before the change reads them in
place of today's defaults, so that its checkpoint means what it meant. A value
that means something else today has another name since.
"""

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


def upgrade(model: Mapping[str, Any], written: int) -> dict[str, Any]:
  """Returns the group `model` of a config of format `written` as of today.

  Values of the wrong form stay as they are: whoever reads them says so.
  """
  model = dict(model)
  for version, keys in RENAMED.items():
    for key, names in keys.items():
      if version > written and isinstance(model.get(key), str):
        model[key] = names.get(model[key], model[key])
  mixers = model.get('mixers', {})
  pattern = model.get('pattern', ('attention',))
  if not isinstance(mixers, dict) or not isinstance(pattern, (list, tuple)):
    return model
  names = dict.fromkeys(map(str, (*pattern, *mixers)))
  changed = dict(mixers)
  for version, rows in IMPLIED.items():
    for name in names:
      given = changed.get(name, {})
      implied = rows.get(name.partition(':')[0])
      if version > written and implied and isinstance(given, dict):
        changed[name] = implied | given
  return {**model, 'mixers': changed}
