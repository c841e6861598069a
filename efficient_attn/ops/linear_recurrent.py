"""The additive recurrence, one token at a time.

The form of the definition: any floating dtype, T = 1 for decoding. Its
backward keeps the state of every token, O(T) states of memory.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def recurrent(
  q: Float[Array, 'B T K H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K G V'],
  gate: Float[Array, '#B T K G #H'] | None,
  starts: Bool[Array, 'B T'] | None,
  state: Float[Array, 'B K G H V'],
  *,
  inclusive: bool,
) -> tuple[Float[Array, 'B T K G V'], Float[Array, 'B K G H V']]:
  """Scans S_t = diag(alpha_t) S_{t-1} + k_t v_t^T over the tokens."""
  dtype = state.dtype

  def step(state, inputs):
    q, k, v, gate, start = inputs
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    if start is not None:
      state = jnp.where(start[:, None, None, None, None], 0, state)
    before = state
    if gate is not None:
      state = jnp.exp(gate)[..., None] * state
    state = state + k[:, :, None, :, None] * v[..., None, :]
    read = state if inclusive else before
    return state, jnp.einsum(
      'bkh,bkghv->bkgv', q, read, precision=jax.lax.Precision.HIGHEST
    )

  inputs = jax.tree.map(
    lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, gate, starts)
  )
  state, out = jax.lax.scan(step, state, inputs)
  return jnp.moveaxis(out, 0, 1), state
