"""The independent code that rows of `MIXERS` are compared with.

Plain data: the tests are parametrised by it, and `launch/table.py` shows it
without importing torch. `oracles_test.py` checks that every entry is tested.
"""

from typing import NamedTuple

HF = 'transformers'
FLA = 'flash-linear-attention'


class Oracle(NamedTuple):
  """Independent code that one comparison calls.

  Attributes:
    row: of `MIXERS`.
    package: its name on PyPI.
    code: the class or function that is called.
    part: mixer | op, what is compared with the same weights or arguments.
  """

  row: str
  package: str
  code: str
  part: str = 'mixer'


BLOCKS = {
  'deepseek_v2': Oracle('mla', HF, 'DeepseekV2Attention'),
  'deepseek_v3': Oracle('mla', HF, 'DeepseekV3Attention'),
  'diffllama': Oracle('differential', HF, 'DiffLlamaAttention'),
  'falcon_h1_before_gate': Oracle('mamba2', HF, 'FalconH1Mixer'),
  'falcon_h1_gated': Oracle('mamba2', HF, 'FalconH1Mixer'),
  'falcon_h1_without_norm': Oracle('mamba2', HF, 'FalconH1Mixer'),
  'falcon_mamba': Oracle('mamba', HF, 'FalconMambaMixer'),
  'gated_conv': Oracle('gated_conv', HF, 'Lfm2ShortConv'),
  'gated_deltanet': Oracle('gated_deltanet', HF, 'Qwen3NextGatedDeltaNet'),
  'gpt_oss': Oracle('attention', HF, 'GptOssAttention'),
  'jamba': Oracle('mamba', HF, 'JambaMambaMixer'),
  'kda': Oracle('kda', HF, 'KimiLinearDeltaAttention'),
  'kimi_mla': Oracle('mla', HF, 'KimiLinearAttention'),
  'lightning': Oracle('lightning', HF, 'MiniMaxLightningAttention'),
  'mamba': Oracle('mamba', HF, 'MambaMixer'),
  'mamba2': Oracle('mamba2', HF, 'Mamba2Mixer'),
  'mamba2_groups': Oracle('mamba2', HF, 'Mamba2Mixer'),
  'mamba_biases': Oracle('mamba', HF, 'MambaMixer'),
  'mfa': Oracle('mfa', HF, 'LlamaAttention'),
  'minicpm3': Oracle('mla', HF, 'MiniCPM3Attention'),
  'qwen3_next': Oracle('attention', HF, 'Qwen3NextAttention'),
  'recurrent_gemma': Oracle('rg_lru', HF, 'RecurrentGemmaRecurrentBlock'),
  'rg_lru': Oracle('rg_lru', HF, 'RecurrentGemmaRecurrentBlock'),
  'rwkv4': Oracle('rwkv4', HF, 'RwkvSelfAttention'),
  'xlstm_7b': Oracle('xlstm_7b', HF, 'xLSTMLayer'),
}

LOW_RANK_BLOCKS = {
  'fnet': Oracle('fnet', HF, 'FNetBasicFourierTransform'),
  'funnel': Oracle('funnel', HF, 'FunnelRelMultiheadAttention'),
  'funnel_positions': Oracle(
    'transformer_xl', HF, 'FunnelRelMultiheadAttention'
  ),
  'led': Oracle('attention', HF, 'LEDDecoderAttention'),
  'nystrom': Oracle('nystrom', HF, 'NystromformerSelfAttention'),
  'perceiver': Oracle('perceiver', HF, 'PerceiverAttention'),
  't5': Oracle('attention', HF, 'T5Attention'),
  'transformer_xl': Oracle('transformer_xl', HF, 'XLNetRelativeAttention'),
}

PATTERN_BLOCKS = {
  'bigbird': Oracle('bigbird', HF, 'BigBirdBlockSparseAttention'),
  'bloom': Oracle('attention', HF, 'BloomAttention'),
  'cascade': Oracle('cascade', HF, 'LongformerSelfAttention'),
  'gemma2': Oracle('window', HF, 'Gemma2Attention'),
  'longformer': Oracle('longformer', HF, 'LongformerSelfAttention'),
  'star': Oracle('star', HF, 'LongformerSelfAttention'),
  'swin2': Oracle('attention', HF, 'Swinv2SelfAttention'),
  't5': Oracle('attention', HF, 'T5Attention'),
  't5_decoder': Oracle('attention', HF, 'T5Attention'),
}

ROUTED_BLOCKS = {
  'lightning_indexer': Oracle('dsa', HF, 'DeepseekV32Indexer', 'op'),
  'reformer': Oracle('reformer', HF, 'LSHSelfAttention', 'op'),
}

FLA_BLOCKS = {
  'based': Oracle('based', FLA, 'BasedLinearAttention'),
  'deltanet': Oracle('deltanet', FLA, 'DeltaNet'),
  'deltaproduct': Oracle('deltaproduct', FLA, 'GatedDeltaProduct'),
  'gla': Oracle('gla', FLA, 'GatedLinearAttention'),
  'gsa': Oracle('gsa', FLA, 'GatedSlotAttention'),
  'hedgehog': Oracle('hedgehog', FLA, 'LinearAttention'),
  'hgrn2': Oracle('hgrn2', FLA, 'HGRN2Attention'),
  'linear': Oracle('linear', FLA, 'LinearAttention'),
  'mesa': Oracle('mesa', FLA, 'MesaNet'),
  'path': Oracle('path', FLA, 'PaTHAttention'),
  'qt_vit': Oracle('qt_vit', FLA, 'BasedLinearAttention', 'op'),
  'rebased': Oracle('rebased', FLA, 'ReBasedLinearAttention'),
  'retention': Oracle('retention', FLA, 'MultiScaleRetention'),
  'rodimus': Oracle('rodimus', FLA, 'RodimusAttention'),
  'rwkv5': Oracle('rwkv5', FLA, 'RWKV6Attention'),
  'rwkv6': Oracle('rwkv6', FLA, 'RWKV6Attention'),
}

FLA_OPS = {
  'comba': Oracle('comba', FLA, 'naive_chunk_comba', 'op'),
  'fox': Oracle('fox', FLA, 'naive_forgetting_attn', 'op'),
  'hgrn': Oracle('hgrn', FLA, 'naive_recurrent_hgrn', 'op'),
  'log_linear': Oracle('log_linear', FLA, 'naive_log_linear_attn', 'op'),
  'nsa': Oracle('nsa', FLA, 'naive_nsa_selection', 'op'),
  'rwkv7': Oracle('rwkv7', FLA, 'dplr_recurrence', 'op'),
  'ttt_linear': Oracle('ttt_linear', FLA, 'chunk_ttt_linear_ref', 'op'),
}

LIBRARY_BLOCKS = {
  'additive': Oracle('additive', 'keras', 'AdditiveAttention', 'op'),
  'compressive': Oracle(
    'compressive', 'compressive-transformer-pytorch', 'SelfAttention'
  ),
  'entmax': Oracle('entmax', 'entmax', 'entmax_bisect', 'op'),
  'lambda_network': Oracle('lambda_network', 'lambda-networks', 'LambdaLayer'),
  'linformer': Oracle('linformer', 'linformer', 'LinformerSelfAttention'),
  'luong': Oracle('luong', 'keras', 'Attention', 'op'),
  'mlstm': Oracle('mlstm', 'xlstm', 'mLSTMLayer'),
  'performer': Oracle('performer', 'performer-pytorch', 'SelfAttention'),
  'performer_decoder': Oracle(
    'performer', 'performer-pytorch', 'SelfAttention'
  ),
  'routing': Oracle('routing', 'routing-transformer', 'KmeansAttention', 'op'),
  'sana': Oracle('sana', 'diffusers', 'SanaLinearAttnProcessor2_0'),
  'set_transformer': Oracle(
    'set_transformer', 'torch-geometric', 'InducedSetAttentionBlock'
  ),
  'sinkhorn': Oracle(
    'sinkhorn', 'sinkhorn-transformer', 'SinkhornAttention', 'op'
  ),
  'slstm': Oracle('slstm', 'xlstm', 'sLSTMLayer'),
}

TRANSFORMER_BLOCKS = {
  'bert': Oracle('attention', HF, 'BertLayer'),
  'gpt2': Oracle('attention', HF, 'GPT2Block'),
  'vit': Oracle('attention', HF, 'ViTLayer'),
}

# By the test file that holds the comparisons.
GROUPS = dict(
  blocks=BLOCKS,
  low_rank_blocks=LOW_RANK_BLOCKS,
  pattern_blocks=PATTERN_BLOCKS,
  routed_blocks=ROUTED_BLOCKS,
  fla_blocks=FLA_BLOCKS,
  fla_ops=FLA_OPS,
  library_blocks=LIBRARY_BLOCKS,
  transformer_blocks=TRANSFORMER_BLOCKS,
)


def packages(row: str) -> str:
  """Names the packages that `row` is compared with, '' for none."""
  found = {}  # package -> the parts that are compared
  for group in GROUPS.values():
    for oracle in group.values():
      if oracle.row == row:
        found.setdefault(oracle.package, set()).add(oracle.part)
  return ', '.join(
    name if 'mixer' in parts else f'{name} (op)'
    for name, parts in found.items()
  )
