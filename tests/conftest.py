"""Eight fake CPU devices, so that sharding is tested on any machine."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

jax.config.update('jax_num_cpu_devices', 8)
