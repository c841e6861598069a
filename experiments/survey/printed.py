"""Cells of the surveys' tables as printed, and what of ours stands beside them.

The first cell of a row is ours: a name in `MIXERS`; in AS table 4 it may be
'selector NAME' of `ops.selection` or 'policy NAME' of `decode.eviction`.
"""

import math

from experiments.exponent import slope
from experiments.survey.claims.complexity import LENGTHS

BOTH = 'O(N^2 d) or O(N C d + N d^2)'
CHUNKS = 'O(N C d + N d^2)'
STATES = 'O(N d^2 / C + N d)'

# AS table 2: of decoding or of prompts, what is done to queries and keys, and
# to weights and values.
AS2 = {
  'FlashAttention': ('prefill', '-', '-'),
  'FlashAttention-2': ('prefill', '-', '-'),
  'FlashAttention-3': ('prefill', '- or FP8', '- or FP8'),
  'SageAttention': ('prefill', 'INT8', '-'),
  'SageAttention2': ('prefill', 'INT4', 'FP8'),
  'SageAttention2++': ('prefill', 'INT4', 'FP8'),
  'SageAttention3': ('prefill', 'FP4', 'FP4'),
  'FlashDecoding': ('decode', 'split', 'split'),
  'PagedAttention': ('decode', 'reallocate', 'reallocate'),
  'KIVI': ('decode', 'INT2', 'INT2'),
  'KVQuant': ('decode', 'INT2/3/4', 'INT2/3/4'),
  'FlashInfer': ('decode', 'reallocate', 'reallocate'),
}

# AS table 4: our row; for language models, stores less, for diffusion, without
# training. '~': a part of the parameters is trained.
AS4 = {
  'StreamingLLM': ('policy streaming_llm', 'yes', 'yes', 'no', 'yes'),
  'DiTFastAttn': ('selector dit_fast_attention', 'no', 'no', 'yes', 'yes'),
  'SampleAttention': ('selector sample_attention', 'yes', 'no', 'no', 'yes'),
  'MoA': ('moa', 'yes', 'yes', 'no', 'yes'),
  'DuoAttention': ('duo', 'yes', 'yes', 'no', '~'),
  'Sparse VideoGen': ('selector svg', 'no', 'no', 'yes', 'yes'),
  'Radial Attention': ('radial', 'no', 'no', 'yes', 'yes'),
  'STA': ('sliding_tile', 'no', 'no', 'yes', 'yes'),
  'NeighborAttn': ('neighborhood', 'no', 'no', 'yes', 'yes'),
  'PAROAttention': ('selector paro', 'no', 'no', 'yes', 'yes'),
  'SpargeAttn': ('selector sparge', 'yes', 'no', 'yes', 'yes'),
  'H2O': ('policy h2o', 'yes', 'yes', 'no', 'yes'),
  'InfLLM': ('selector infllm', 'yes', 'no', 'no', 'yes'),
  'MInference': ('selector minference', 'yes', 'no', 'no', 'yes'),
  'FlexPrefill': ('selector flex_prefill', 'yes', 'no', 'no', 'yes'),
  'SparQ': ('selector sparq', 'yes', 'yes', 'no', 'yes'),
  'Loki': ('selector loki', 'yes', 'no', 'no', 'yes'),
  'HashAttention': ('hash', 'yes', 'no', 'no', '~'),
  'SeerAttention': ('seer', 'yes', 'no', 'no', '~'),
  'RetrievalAttention': ('selector retrieval', 'yes', 'yes', 'no', 'yes'),
  'FPSAttention': ('selector fps', 'no', 'no', 'yes', 'no'),
  'NSA': ('nsa', 'yes', 'yes', 'no', 'no'),
  'MoBA': ('moba', 'yes', 'no', 'no', 'no'),
  'VMoBA': ('selector vmoba', 'yes', 'no', 'yes', 'no'),
  'CHAI': ('selector chai', 'yes', 'yes', 'no', 'yes'),
  'Quest': ('selector quest', 'yes', 'no', 'no', 'yes'),
  'MagicPig': ('selector magicpig', 'yes', 'no', 'no', 'yes'),
  'DraftAttention': ('selector draft_attention', 'no', 'no', 'yes', 'yes'),
  'XAttention': ('selector xattention', 'yes', 'no', 'yes', 'yes'),
  'VSA': ('vsa', 'no', 'no', 'yes', 'no'),
  'Sparse VideoGen2': ('selector svg2', 'no', 'no', 'yes', 'yes'),
}

# AS tables 5-7: our row, the forget gate and the select gate, time and space
# of training, the form, and time and space of decoding N tokens.
AS5 = {
  'Linear Transformer': ('linear', '1^T 1', '1', 'O(N^2 d)', 'O(N^2)',
                         'quadratic', 'O(N d^2)', 'O(N d)'),
  'CHELA': ('chela', '1^T 1', '1', 'O(N^2 d)', 'O(N^2)', 'quadratic',
            'O(N d^2)', 'O(N d)'),
  'Lightning': ('lightning', '1^T 1', '1', CHUNKS, 'O(N d)', 'chunkwise',
                'O(N d^2)', 'O(N d)'),
  'SLA': ('slab', '1^T 1', '1', BOTH, 'O(N^2) or O(N d)',
          'quadratic or chunkwise', 'O(N d^2)', 'O(N d)'),
}  # fmt: skip
AS6 = {
  'RetNet': ('retention', 'gamma 1^T 1', '1', BOTH, f'O(N^2) or {STATES}',
             'quadratic or chunkwise', '', ''),
  'GLA': ('gla', 'alpha_t^T 1', '1', CHUNKS, STATES, 'chunkwise', '', ''),
  'RWKV-4': ('rwkv4', 'e^-w', '1', 'O(N d)', 'O(d)', 'parallel', '', ''),
  'RWKV-5': ('rwkv5', 'w^T 1', '1', CHUNKS, 'O(N d^2 / C)', 'chunkwise', '',
             ''),
  'RWKV-6': ('rwkv6', 'w_t^T 1', '1', CHUNKS, 'O(N d^2 / C)', 'chunkwise', '',
             ''),
  'RWKV-7': ('rwkv7', 'diag(w_t) - kappa_t (a_t * kappa_t)', '1', CHUNKS,
             'O(N d^2 / C)', 'chunkwise', '', ''),
  'GSA': ('gsa', 'alpha_t^T 1', '1', CHUNKS, STATES, 'chunkwise', '', ''),
  'MetaLA': ('metala', 'alpha_t^T 1', '1', CHUNKS, STATES, 'chunkwise', '', ''),
}  # fmt: skip
AS7 = {
  'Rodimus': ('rodimus', 'exp(-g_t * tau_t)^T 1', '(g_t^tau_t)^T beta_t',
              CHUNKS, STATES, 'chunkwise', 'O(N d^2)', 'O(N d)'),
  'DeltaNet': ('deltanet', 'I - beta_t k_t k_t^T', 'beta_t', 'O(N d^2)',
               'O(d^2)', 'sequential', 'O(N d^2)', 'O(N d)'),
  'DeltaNet2': ('deltanet', 'I - beta_t k_t k_t^T', 'beta_t', CHUNKS, 'O(d)',
                'chunkwise', 'O(N d^2)', 'O(N d)'),
  'Mamba': ('mamba', 'exp(Delta A)', '(Delta A)^-1 (exp(Delta A) - I) Delta B',
            'O(N d)', 'O(N d)', 'parallel scan', 'O(N d^2)', 'O(d)'),
  'gDeltaNet': ('gated_deltanet', 'alpha_t (I - beta_t k_t k_t^T)', 'beta_t',
                CHUNKS, 'O(d)', 'chunkwise', 'O(N d^2)', 'O(N d)'),
  'Mamba2': ('mamba2', 'A_t', '1', 'O(N d^2)', 'O(N d)', 'chunkwise',
             'O(N d^2)', 'O(N d)'),
}  # fmt: skip

# FL table 4 and section 4: our row and the cost.
FL4 = {
  'Star-Transformer': ('star', 'O(N)'),
  'Sparse Transformer': ('sparse_transformer', 'O(N sqrt N)'),
  'Cascade': ('cascade', 'O(N b m^l)'),
  'LogSparse': ('logsparse', 'O(N log N)'),
  'BlockBERT': ('blockbert', 'O(N^2 / n_b)'),
  'Longformer': ('longformer', 'O(N)'),
  'BigBird': ('bigbird', 'O(N)'),
  'Sinkhorn': ('sinkhorn', 'O(n_b^2)'),
  'SparseBERT': ('dam', ''),
  'Adaptively sparse': ('entmax', 'O(N^2)'),
  'Reformer': ('reformer', 'O(N log N)'),
  'Routing Transformer': ('routing', ''),
  'Linformer': ('linformer', 'O(N)'),
  'Synthesizer': ('synthesizer', 'O(N^2)'),
  'Nystromformer': ('nystrom', 'O(N)'),
  'Linear Transformer': ('linear', 'O(N)'),
  'Performer': ('performer', 'O(N)'),
  'Clustered attention': ('clustered', 'O(N)'),
  'Transformer-XL': ('transformer_xl', ''),
  'Compressive Transformer': ('compressive', ''),
  'Funnel-Transformer': ('funnel', 'O(N^2)'),
}

# S003, master comparison: our row, time, memory, quality.
S003 = {
  'Standard': ('attention', 'O(N^2 d)', 'O(N^2)', '100%'),
  'Flash Attention': ('attention', 'O(N^2 d)', 'O(N)', '100%'),
  'Sliding Window': ('window', 'O(N w d)', 'O(N w)', '~98%'),
  'Linear/Kernel': ('linear', 'O(N d^2)', 'O(N d)', '~95%'),
  'Linformer': ('linformer', 'O(N k d)', 'O(N k)', '~96%'),
  'LSH (Reformer)': ('reformer', 'O(N log N)', 'O(N log N)', '~97%'),
  'GLA': ('gla', 'O(N d^2)', 'O(N d)', '~98%'),
  'DeltaNet': ('deltanet', 'O(N d^2)', 'O(N d)', '~99%'),
  'Mamba': ('mamba', 'O(N d)', 'O(d)', '~97%'),
  'KDA (Kimi)': ('kda', 'O(N d^2)', 'O(N d)', '101%+'),
}

# Exponents of N of what is printed; all else is held.
EXPONENTS = {
  'O(N^2 d)': 2,
  'O(N^2)': 2,
  'O(N^2 / n_b)': 2,
  'O(n_b^2)': 2,
  'O(N sqrt N)': 1.5,
  'O(N log N)': slope(LENGTHS, [n * math.log(n) for n in LENGTHS]),
  'O(N)': 1,
  'O(N w)': 1,
  'O(N w d)': 1,
  'O(N k)': 1,
  'O(N k d)': 1,
  'O(N d)': 1,
  'O(N d^2)': 1,
  'O(N b m^l)': 1,
  'O(N d^2 / C)': 1,
  'O(N d^2 / C + N d)': 1,
  'O(N C d + N d^2)': 1,
  'O(d)': 0,
  'O(d^2)': 0,
}
# What decays the past, as `MixerSpec.gate` calls it.
GATES = {
  '1^T 1': 'none',
  'gamma 1^T 1': 'constant',
  'alpha_t^T 1': 'channel',
  'e^-w': 'channel',
  'w^T 1': 'channel',
  'w_t^T 1': 'channel',
  'diag(w_t) - kappa_t (a_t * kappa_t)': 'channel',
  'exp(-g_t * tau_t)^T 1': 'channel',
  'I - beta_t k_t k_t^T': 'none',
  'alpha_t (I - beta_t k_t k_t^T)': 'scalar',
  'exp(Delta A)': 'channel',
  'A_t': 'scalar',
}
# As `MixerSpec.forms` calls them; scans over channels run in chunks here.
FORMS = {
  'quadratic': 'parallel',
  'chunkwise': 'chunkwise',
  'sequential': 'recurrent',
  'parallel': 'chunkwise',
  'parallel scan': 'chunkwise',
}
FORMATS = {
  '-': 'float16',
  'INT8': 'int8',
  'INT4': 'int4',
  'FP8': 'e4m3',
  'FP4': 'e2m1',
}
# Rows of AS table 2: the claim that compares outputs, its value and limit.
EXACT = {
  'FlashAttention': ('R07', 'error float32', 1e-5),
  'FlashAttention-2': ('R07', 'error float32', 1e-5),
  'FlashDecoding': ('R13', 'error', 1e-12),
  'PagedAttention': ('R14', 'error', 1e-12),
  'FlashInfer': ('R14', 'error', 1e-12),
}
# Rows of AS table 2: our recipe, and the value of R11.
SAGE = {
  'SageAttention': ('sage1', 'int8 smooth 0'),
  'SageAttention2': ('sage2', 'int4 smooth 0'),
  'SageAttention2++': ('sage2++', 'int4 smooth 0'),
  'SageAttention3': ('sage3', 'fp4 two levels'),
}
# Rows of AS table 2: values of R12, for keys and for values.
TWO_BITS = {
  'KIVI': ('trained keys by channel', 'trained values by token'),
  'KVQuant': ('trained keys, not rotated by channel', ''),
}
# Rows of FL table 4: what R24 and R25 count.
PAIRS = {
  'Sparse Transformer': 'strided',
  'LogSparse': 'log-sparse',
  'Longformer': 'window and a global token',
}
# Rows of the master comparison: in R29, in R30 and in R21.
TRAINED = {
  'Standard': ('attention', 'Transformer', 'attention'),
  'Flash Attention': ('attention', 'Transformer', 'attention'),
  'Sliding Window': ('', 'Longformer', ''),
  'Linear/Kernel': ('linear', 'Linear Transformer', 'linear'),
  'Linformer': ('', 'Linformer', ''),
  'LSH (Reformer)': ('', 'Reformer', ''),
  'GLA': ('gla', '', 'gla'),
  'DeltaNet': ('deltanet', '', 'deltanet'),
  'Mamba': ('', '', 'mamba'),
  'KDA (Kimi)': ('kda', '', ''),
}
# Those that other claims train instead: on what, and the row there.
ALONE = {
  'Sliding Window': ('R43', 'text', 'window'),
  'Linformer': ('R51', 'images', 'linformer'),
  'LSH (Reformer)': ('R43', 'text', 'reformer'),
  'Mamba': ('R43', 'text', 'mamba'),
}
