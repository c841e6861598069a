"""VSA, video sparse attention (Zhang et al. 2505.13389), for encoders.

  o_t = g^c_t o^c_{cube(t)} + g^f_t o^f_t,   (g^c, g^f)_t = W_g x_t

The coarse branch is attention between means over the cubes of a `grid` of
tokens; the fine one is attention to the tokens of the `top_k` cubes that the
coarse one weighs most; see `ops.routed.vsa`. O(T top_k cube) and O((T /
cube)^2).
"""

import functools

from efficient_attn import sharding
from efficient_attn.config import ConfigError
from efficient_attn.layers.mixer import WholeMixer, check_has_grid
from efficient_attn.layers.mixers.routed.heads import GroupedHeads
from efficient_attn.layers.param import Projection
from efficient_attn.ops.routed.vsa import cut, vsa_attention
from efficient_attn.values import Positive


class VSA(WholeMixer, GroupedHeads):
  """Token mixer [B, T, D] -> [B, T, D]; see the module docstring."""

  def __init__(
    self,
    *,
    cube: tuple[Positive, ...] = (4, 4, 4),
    top_k: Positive = 32,
    **options,
  ):
    super().__init__(**options)
    axes = {'heads': self.heads[0], 'head_dim': self.heads[1]}
    self.coarse_gate, self.fine_gate = (
      Projection({'embed': options['d_model']}, axes, rngs=options['rngs'])
      for _ in range(2)
    )
    self.cube = tuple(cube)
    self.top_k = top_k

  def check_grid(self, grid):
    """Raises where there is no grid, or cubes of other axes."""
    check_has_grid('vsa', grid)
    if len(grid) != len(self.cube):
      raise ConfigError(
        f'vsa: cube={self.cube} has {len(self.cube)} axes, but the grid of the'
        f' tokens, {grid}, has {len(grid)}; set cube to as many'
      )

  def mix_whole(self, x, context):
    """Mixes tokens; see `layers.mixer` for the contract."""
    grid = context.grid
    self.check_grid(grid)
    attend = functools.partial(
      vsa_attention,
      cubes=cut(grid, self.cube),
      top_k=self.top_k,
    )
    layouts = ('BTNH', 'BTKH', 'BTKV', 'BTNV', 'BTNV')
    op = sharding.local_op(attend, layouts, 'BTNV')
    heads = self.project(x, context, None)
    return self.out(op(*heads, self.coarse_gate(x), self.fine_gate(x)))
