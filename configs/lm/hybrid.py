"""Hybrids of recurrent layers and attention, as patterns.

  python launch/train.py --config=configs/lm/hybrid.py:kimi_linear \\
    --workdir=runs/kimi_linear

has 24 layers of width 1024, about 0.3 billion parameters: give it accelerators
and text of your own (--config.data.path). With `,tiny` a hybrid trains on a
laptop:

  python launch/train.py --config=configs/lm/hybrid.py:samba,tiny \\
    --workdir=runs/samba

300 steps of it take two to ten minutes on 2 CPU cores, and end at 2.27
(qwen3_next), 2.28 (kimi_linear), 2.30 (samba) and 2.65 (griffin) bits per byte
of held-out files of the standard library, one seed each.
"""

import ml_collections

from efficient_attn.config import ConfigError, words

HYBRIDS = {
  # Kimi Linear (2510.26692); its attention carries no positions.
  'kimi_linear': dict(
    pattern=('kda', 'kda', 'kda', 'attention'),
    mixers=dict(attention=dict(position='none')),
  ),
  # Qwen3-Next.
  'qwen3_next': dict(
    pattern=('gated_deltanet',) * 3 + ('attention',),
    mixers=dict(
      attention=dict(num_kv_heads=2, qk_norm=True),
      gated_deltanet=dict(norm_eps=1e-6),
    ),
  ),
  # Samba (2406.07522); with one window in eight layers it is Jamba's ratio.
  'samba': dict(
    pattern=('mamba', 'window'),
    mixers=dict(window=dict(window=2048)),
  ),
  # Griffin (2402.19427); its attention has one key-value head.
  'griffin': dict(
    pattern=('rg_lru', 'rg_lru', 'window'),
    mixers=dict(window=dict(window=1024, num_kv_heads=1)),
    activation='gelu_tanh',
  ),
}


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  """One of HYBRIDS (kimi_linear); 'samba,tiny' is for a laptop."""
  found = words(arg, 'tiny', *HYBRIDS)
  names = [name for name in HYBRIDS if name in found] or ['kimi_linear']
  if len(names) > 1:
    raise ConfigError(f'--config=...:{arg}: name one hybrid, not {len(names)}')
  config = ml_collections.ConfigDict()
  config.model = dict(
    name='lm', d_model=1024, num_layers=24, num_heads=8, **HYBRIDS[names[0]]
  )
  config.data = dict(name='text', seq_len=2048)
  config.optimizer = dict(learning_rate=3e-4, warmup_steps=1000)
  config.update(batch_size=128, steps=20_000)
  if 'tiny' in found:
    layers = len(config.model.pattern)
    config.model.update(d_model=96, num_layers=layers, num_heads=4)
    config.data.seq_len = 256
    config.optimizer.update(learning_rate=6e-3, warmup_steps=30)
    config.update(batch_size=8, steps=300)
  return config
