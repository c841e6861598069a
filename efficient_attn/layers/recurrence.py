"""What the mixers with a recurrent state share: running the op, its output."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.norm import RMSNorm
from efficient_attn.layers.param import LowRank, Projection

# The layout of an argument by its rank: a decay per head, a bonus, a scalar
# and a vector per token and head.
ARGUMENTS = ('', 'N', 'NH', 'BTN', 'BTNH')
STATES = ('', 'B', 'BN', 'BNH', 'BNHV', 'BNMHV')


def run_op(
  op: Callable,
  arrays: Mapping[str, jax.Array | None],
  *,
  segment_ids: jax.Array | None = None,
  state=None,
  layouts: Mapping[str, str] | None = None,
  **options,
):
  """Runs an op of the linear family on the shards of its arguments.

  Args:
    op: called as op(**arrays, segment_ids=, initial_state=, **options); its
      heads are independent of each other.
    arrays: arguments of the op by name, laid out by their rank (ARGUMENTS).
    segment_ids: [B, T] or None.
    state: pytree whose leaves are laid out by their rank (STATES), or None.
    layouts: the layout of the arrays that rank does not tell, by name.
    **options: whatever else the op takes.

  Returns:
    out: [B, T, N, V].
    state: as the op returns it.
  """

  def call(arrays, segment_ids, state):
    return op(**arrays, segment_ids=segment_ids, initial_state=state, **options)

  special = layouts or {}
  inputs = {
    name: special.get(name) or ARGUMENTS[array.ndim]
    for name, array in arrays.items()
    if array is not None
  }
  arrays = {name: arrays[name] for name in inputs}

  def lay_out(out, state):
    return 'BTNV', jax.tree.map(lambda s: STATES[s.ndim], state)

  return sharding.local_op(
    call, (inputs, 'BT', lambda leaf: STATES[leaf.ndim]), lay_out
  )(arrays, segment_ids, state)


class GatedOutput(nnx.Module):
  """y = W_out (norm_per_head(o) * activation(W_gate x)).

  The output of RetNet, GLA and Gated DeltaNet (silu), of Comba (sigmoid) and of
  Kimi Delta Attention (sigmoid, with a gate of low rank).
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    value_dim: int,
    *,
    rngs: nnx.Rngs,
    activation: Callable = jax.nn.silu,
    rank: int = 0,
    eps: float = 1e-6,
  ):
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.norm = RMSNorm(value_dim, eps=eps)
    if rank:
      self.gate = LowRank(d_model, rank, heads, rngs=rngs)
    else:
      self.gate = Projection({'embed': d_model}, heads, rngs=rngs)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)
    self.activation = activation

  def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
    """Maps heads o [B, T, N, V] and the mixer's input x to [B, T, D]."""
    return self.out(self.norm(o) * self.activation(self.gate(x)))


class NormedOutput(nnx.Module):
  """y = W_out norm_per_head(o), the output of DeltaNet."""

  def __init__(self, d_model, num_heads, value_dim, *, eps: float, rngs):
    heads = {'heads': num_heads, 'head_dim': value_dim}
    self.norm = RMSNorm(value_dim, eps=eps)
    self.out = Projection(heads, {'embed': d_model}, rngs=rngs)

  def __call__(self, o: jax.Array, x: jax.Array) -> jax.Array:
    """Maps heads o [B, T, N, V] to [B, T, D]; the input x does not matter."""
    return self.out(self.norm(o))
