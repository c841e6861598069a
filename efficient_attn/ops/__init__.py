"""Pure functions on arrays of one device; see each function's docstring.

softmax, routed, low_rank and recurrent hold the families of methods, masks and
selection what softmax attention may look at.
"""

from efficient_attn.ops import masks, scores, selection
from efficient_attn.ops.positions import rotary, sincos_2d, sinusoidal
from efficient_attn.ops.recurrent.affine_summary import affine_summary
from efficient_attn.ops.recurrent.delta_product import delta_product
from efficient_attn.ops.recurrent.delta_rule import (
  delta_rule,
  explain_delta_rule,
)
from efficient_attn.ops.recurrent.diagonal_scan import (
  diagonal_scan,
  explain_diagonal_scan,
)
from efficient_attn.ops.recurrent.dplr import dplr, explain_dplr
from efficient_attn.ops.recurrent.fast_weights import fast_weights
from efficient_attn.ops.recurrent.forms import choose_form
from efficient_attn.ops.recurrent.gated_slot_attention import (
  gated_slot_attention,
)
from efficient_attn.ops.recurrent.lact import large_chunk_fast_weights
from efficient_attn.ops.recurrent.linear_attention import (
  explain_linear_attention,
  linear_attention,
)
from efficient_attn.ops.recurrent.log_linear import log_linear_attention
from efficient_attn.ops.recurrent.mesa import mesa_recurrence
from efficient_attn.ops.recurrent.mlstm import mlstm
from efficient_attn.ops.recurrent.selective_scan import (
  explain_selective_scan,
  selective_scan,
)
from efficient_attn.ops.recurrent.short_conv import short_conv
from efficient_attn.ops.recurrent.slstm import slstm
from efficient_attn.ops.recurrent.trapezoid import trapezoidal_scan
from efficient_attn.ops.recurrent.wkv4 import explain_wkv4, wkv4
from efficient_attn.ops.softmax.attention import attention, explain_attention
from efficient_attn.ops.softmax.attention_merge import (
  merge_attention,
  split_attention,
)
from efficient_attn.ops.softmax.paged_attention import (
  explain_paged_attention,
  paged_attention,
)
from efficient_attn.ops.softmax.path_attention import path_attention
from efficient_attn.ops.softmax.sage_attention import sage_attention

__all__ = [
  'affine_summary',
  'attention',
  'choose_form',
  'delta_product',
  'delta_rule',
  'diagonal_scan',
  'dplr',
  'explain_attention',
  'explain_delta_rule',
  'explain_diagonal_scan',
  'explain_dplr',
  'explain_linear_attention',
  'explain_paged_attention',
  'explain_selective_scan',
  'explain_wkv4',
  'fast_weights',
  'large_chunk_fast_weights',
  'linear_attention',
  'log_linear_attention',
  'masks',
  'merge_attention',
  'mesa_recurrence',
  'mlstm',
  'paged_attention',
  'path_attention',
  'rotary',
  'sage_attention',
  'scores',
  'selection',
  'selective_scan',
  'short_conv',
  'sincos_2d',
  'sinusoidal',
  'gated_slot_attention',
  'slstm',
  'split_attention',
  'trapezoidal_scan',
  'wkv4',
]
