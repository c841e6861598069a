"""How to compile, on a CPU, a program that runs once or on small arrays.

Optimising it would take longer than running it: without, XLA compiles in a
quarter of the time.
"""

import jax

QUICK_COMPILE = {'xla_backend_optimization_level': 0}
if jax.__version_info__ < (0, 11):  # later versions have one emitter only
  QUICK_COMPILE['xla_cpu_use_fusion_emitters'] = False
