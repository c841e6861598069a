"""Linear attention that never forgets: the state only adds up."""

from efficient_attn.layers.mixers.spec import MixerSpec
from efficient_attn.layers.mixers.ungated.linear import Linear

UNGATED = {
  'linear': MixerSpec(Linear, 'Linear Transformer', 2020, '2006.16236'),
}
