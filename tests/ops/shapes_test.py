"""Arrays that no op of the linear family can use are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.isolation_test import OPS, T


@pytest.mark.parametrize('name', OPS)
def test_empty_batches_and_eight_bits_are_refused(name):
  make, op, options = OPS[name]
  arrays = {
    k: jnp.asarray(np.asarray(x, np.float32)) for k, x in make().items()
  }

  def call(arrays):
    jax.eval_shape(lambda **a: op(**a, **options), **arrays)

  call(arrays)
  empty = {k: x[:0] if x.shape[:2] == (2, T) else x for k, x in arrays.items()}
  with pytest.raises(ValueError, match='axis 0 is empty'):
    call(empty)
  eight = {k: x.astype(jnp.float8_e4m3fn) for k, x in arrays.items()}
  with pytest.raises(ValueError, match='16 bits or more'):
    call(eight)
