"""The weights of Mamba and Mamba-2 in the models that use them, by our names.

Imported after `pytest.importorskip('torch')`.
"""

import functools
import math

import numpy as np

from tests.interop.pairs import D, N, Pair, build, cached, put, randomize

STATE = 16


def selective(theirs, config, **options) -> Pair:
  """Mamba with biases and norms as far as theirs has them."""
  w = randomize(theirs, **{'dt_proj.bias': -2.0, 'D': 1.0})
  ours = build('mamba', chunk_size=16, **options)
  for part in ('weight', 'bias'):
    if f'in_proj.{part}' in w:
      value, gate = np.split(w[f'in_proj.{part}'], 2)
      put(getattr(ours.value, part), value.T)
      put(getattr(ours.gate, part), gate.T)
      put(getattr(ours.out, part), w[f'out_proj.{part}'].T)
    if f'conv1d.{part}' in w:
      put(getattr(ours.conv, part), w[f'conv1d.{part}'].squeeze().T)
  put(ours.select.weight, w['x_proj.weight'].T)
  put(ours.dt.weight, w['dt_proj.weight'].T)
  put(ours.dt_bias, w['dt_proj.bias'])
  put(ours.a_log, w['A_log'])
  put(ours.skip, w['D'])
  if options.get('select_norm') == 'scaled':
    for norm, name in zip(ours.select_norms, ('dt', 'b', 'c'), strict=True):
      put(norm.scale, w[f'{name}_layernorm.weight'])
  return cached(ours, theirs, config)


def mamba() -> Pair:
  from transformers.models.mamba import modeling_mamba as hf

  config = hf.MambaConfig(hidden_size=D, num_hidden_layers=1)
  return selective(hf.MambaMixer(config, layer_idx=0), config)


def mamba_biases() -> Pair:
  from transformers.models.mamba import modeling_mamba as hf

  config = hf.MambaConfig(
    hidden_size=D,
    num_hidden_layers=1,
    use_bias=True,
    use_conv_bias=False,
    state_size=8,
    expand=3,
    time_step_rank=5,
  )
  return selective(
    hf.MambaMixer(config, layer_idx=0),
    config,
    in_bias=True,
    out_bias=True,
    conv_bias=False,
    d_state=8,
    expand=3,
    dt_rank=5,
  )


def falcon_mamba() -> Pair:
  """An eps that shows: theirs is 1e-6."""
  from transformers.models.falcon_mamba import modeling_falcon_mamba as hf

  config = hf.FalconMambaConfig(
    hidden_size=D, num_hidden_layers=1, mixer_rms_eps=0.1
  )
  theirs = hf.FalconMambaMixer(config, 0, initialize_mixer_weights=False)
  return selective(theirs, config, select_norm='plain', norm_eps=0.1)


def jamba() -> Pair:
  from transformers.models.jamba import modeling_jamba as hf

  config = hf.JambaConfig(
    hidden_size=D,
    num_hidden_layers=1,
    rms_norm_eps=0.1,
    attn_layer_offset=1,
    use_mamba_kernels=False,
  )
  theirs = hf.JambaMambaMixer(config, layer_idx=0)
  return selective(theirs, config, select_norm='scaled', norm_eps=0.1)


def dual(theirs, config, groups=1, **options) -> Pair:
  """Mamba-2 with biases and a norm as far as theirs has them."""
  w = randomize(theirs, dt_bias=-2.0, norm=1.0, D=1.0)
  ours = build(
    'mamba2', state_dim=STATE, groups=groups, chunk_size=16, **options
  )
  inner = math.prod(ours.x.weight.shape[1:])
  sizes = [inner, inner, 2 * groups * STATE]
  projections = ours.gate, ours.x, ours.bc, ours.dt
  for part in ('weight', 'bias'):
    if f'in_proj.{part}' in w:
      parts = np.split(w[f'in_proj.{part}'], np.cumsum(sizes))
      for projection, rows in zip(projections, parts, strict=True):
        put(getattr(projection, part), rows.T)
      put(getattr(ours.out, part), w[f'out_proj.{part}'].T)
    if f'conv1d.{part}' in w:
      x, bc = np.split(w[f'conv1d.{part}'], [inner])
      put(getattr(ours.x_conv, part), x.squeeze().T)
      put(getattr(ours.bc_conv, part), bc.squeeze().T)
  put(ours.dt_bias, w['dt_bias'])
  put(ours.a_log, w['A_log'])
  put(ours.skip, w['D'])
  if 'norm.weight' in w:
    put(ours.norm.scale, w['norm.weight'])
  put(ours.out.weight, w['out_proj.weight'].T)
  return cached(ours, theirs, config)


def mamba2() -> Pair:
  from transformers.models.mamba2 import modeling_mamba2 as hf

  config = hf.Mamba2Config(
    hidden_size=D,
    num_hidden_layers=1,
    num_heads=N,
    head_dim=2 * D // N,
    state_size=STATE,
    n_groups=1,
    chunk_size=8,
  )
  return dual(hf.Mamba2Mixer(config, layer_idx=0), config)


def mamba2_groups() -> Pair:
  """More heads than the model, in groups, and limits of dt that are met."""
  from transformers.models.mamba2 import modeling_mamba2 as hf

  config = hf.Mamba2Config(
    hidden_size=D,
    num_hidden_layers=1,
    num_heads=2 * N,
    head_dim=D // N,
    state_size=STATE,
    n_groups=2,
    use_bias=True,
    use_conv_bias=False,
    time_step_limit=(0.1, 0.5),
    chunk_size=8,
  )
  return dual(
    hf.Mamba2Mixer(config, layer_idx=0),
    config,
    groups=2,
    num_heads=2 * N,
    in_bias=True,
    out_bias=True,
    conv_bias=False,
    dt_min=0.1,
    dt_max=0.5,
  )


def falcon_h1(norm: str) -> Pair:
  from transformers.models.falcon_h1 import modeling_falcon_h1 as hf

  multipliers = (0.5, 1.5, 0.7, 1.3, 0.9)
  config = hf.FalconH1Config(
    hidden_size=D,
    num_hidden_layers=1,
    num_attention_heads=N,
    mamba_d_ssm=72,
    mamba_n_heads=6,
    mamba_d_head=12,
    mamba_n_groups=2,
    mamba_d_state=STATE,
    mamba_chunk_size=8,
    mamba_rms_norm=norm != 'none',
    mamba_norm_before_gate=norm == 'before_gate',
    ssm_multipliers=list(multipliers),
  )
  theirs = hf.FalconH1Mixer(config, layer_idx=0)
  theirs.register_buffer('mup_vector', hf.compute_mup_vector(config))
  return dual(
    theirs,
    config,
    groups=2,
    num_heads=6,
    head_dim=12,
    multipliers=multipliers,
    norm=norm,
  )


def falcon_h1_gated() -> Pair:
  return falcon_h1('gated')


def falcon_h1_before_gate() -> Pair:
  return falcon_h1('before_gate')


def falcon_h1_without_norm() -> Pair:
  return falcon_h1('none')


BLOCKS = {
  f.__name__: functools.cache(f)
  for f in (
    mamba,
    mamba_biases,
    falcon_mamba,
    jamba,
    mamba2,
    mamba2_groups,
    falcon_h1_gated,
    falcon_h1_before_gate,
    falcon_h1_without_norm,
  )
}
