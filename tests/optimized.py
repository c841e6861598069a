"""Programs compiled as users compile them, not as quickly as tests do."""

import functools

import jax

from efficient_attn.quick_compile import QUICK_COMPILE

DEFAULTS = {
  'xla_backend_optimization_level': 3,
  'xla_cpu_use_fusion_emitters': True,
}
OPTIONS = {name: DEFAULTS[name] for name in QUICK_COMPILE}
optimized = functools.partial(jax.jit, compiler_options=OPTIONS)
