"""MiniCPM3 (2404.06395): MLA, with factors of embeddings, branches, logits."""

import dataclasses
import math

from efficient_attn.interop.families.deepseek import (
  IGNORED,
  LATENT,
  MLA,
  queries,
)
from efficient_attn.interop.families.llama import FFN, LLAMA, NORMS
from efficient_attn.interop.rotary_words import Rope
from efficient_attn.interop.words import COUNT, Word, word


@dataclasses.dataclass(frozen=True)
class Depth:
  """MiniCPM's factors of branches and of logits, which depend on sizes."""

  theirs: tuple[str, ...] = ('scale_depth', 'dim_model_base')

  def read(self, words):
    """Returns the factors."""
    branch = word(words, 'scale_depth', 1.4) / math.sqrt(words[COUNT])
    base = word(words, 'dim_model_base', 256)
    return {
      'residuals.mla.branch': branch,
      'residuals.glu.branch': branch,
      'logits.scale': base / words['hidden_size'],
    }

  def write(self, ours):
    """Returns what the factors are made of."""
    depth = ours.get('residuals.mla.branch') * math.sqrt(ours.get('num_layers'))
    base = ours.get('logits.scale') * ours.get('d_model')
    return {
      'scale_depth': float(f'{depth:.12g}'),
      'dim_model_base': round(base),
    }


MINICPM3 = dataclasses.replace(
  LLAMA,
  architecture='MiniCPM3ForCausalLM',
  words=(
    *LATENT,
    Word('rms_norm_eps', 'norms.eps', 1e-5),
    Word('tie_word_embeddings', 'tie_embeddings', True),
    Word('scale_emb', 'embedding.scale', 12),
    Word('mlp_bias', 'ffn_bias', False),
    Depth(),
    Rope(),
  ),
  ours=LLAMA.ours | {'pattern': ('mla',)},
  blocks=(*NORMS, *MLA, *FFN),
  ignored=IGNORED,
  indices=queries,
)
