"""Compiling as users do, which takes several times as long as tests do."""

import functools

import jax

OPTIONS = {'xla_backend_optimization_level': 3}
if jax.__version_info__ < (0, 11):  # later versions have one emitter only
  OPTIONS['xla_cpu_use_fusion_emitters'] = True
optimized = functools.partial(jax.jit, compiler_options=OPTIONS)
