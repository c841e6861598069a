"""The mixture of experts: a router, experts of which each token has a few.

  y = sum_{e chosen} weight_e expert_e(x) + [sigmoid(x W_s)] shared(x)

An expert is a GLU or an MLP (`layers.ffn`). No token is dropped. Each device
along `fsdp` has some of the experts and reads the tokens of all, so that no
expert is gathered.

The layer taps (`layers.capture`) what training adds to its objective as
`penalty`, and as `expert_load` how many tokens each expert had.
"""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_attn import sharding
from efficient_attn.layers.capture import tap
from efficient_attn.layers.context import Context
from efficient_attn.layers.ffn import GLU, MLP, gated, glu_width
from efficient_attn.layers.param import (
  Projection,
  fan_in_normal,
  param,
)
from efficient_attn.layers.router import Router, Routing, one_hot
from efficient_attn.ops.experts import grouped_dot, mix_experts
from efficient_attn.values import (
  NonNegative,
  NonNegativeFloat,
  OneOf,
  Positive,
)


class ExpertProjection(nnx.Module):
  """A linear map of each expert: weight [E, *inputs, *outputs]."""

  def __init__(
    self,
    num_experts: int,
    inputs: dict[str, int],
    outputs: dict[str, int],
    *,
    bias: bool,
    rngs: nnx.Rngs,
  ):
    (fan_in,), (fan_out,) = inputs.values(), outputs.values()
    shape = (num_experts, fan_in, fan_out)
    weight = fan_in_normal()(rngs.params(), shape, fan_in)
    self.weight = param(weight, ('experts', *inputs, *outputs), inputs=1)
    zeros = jnp.zeros((num_experts, fan_out))
    self.bias = param(zeros, ('experts', *outputs)) if bias else None


class MoE(nnx.Module):
  """A mixture of `num_experts` experts, of which each token has `top_k`.

  Args:
    d_model: D.
    ffn_dim: the width of an expert; 0: as of one glu or mlp.
    activation: of the experts.
    bias: whether each of their projections has one.
    num_experts: E.
    top_k: experts of a token.
    router: how they are chosen.
    expert: glu | mlp.
    limit: of the gate of an expert, see `GLU`; 0: none.
    offset: of what the gate multiplies, see `GLU`.
    shared_dim: the width of an expert that every token has; 0: none.
    shared_gate: whether that one is gated by a sigmoid of the token.
    rngs: of the parameters.
  """

  def __init__(
    self,
    d_model: int,
    ffn_dim: int,
    activation,
    *,
    bias: bool = False,
    num_experts: Positive = 8,
    top_k: Positive = 2,
    router: Routing = Routing(),  # noqa: B008
    expert: Annotated[str, OneOf(('glu', 'mlp'))] = 'glu',
    limit: NonNegativeFloat = 0.0,
    offset: float = 0.0,
    shared_dim: NonNegative = 0,
    shared_gate: bool = False,
    rngs: nnx.Rngs,
  ):
    is_glu = expert == 'glu'
    width = ffn_dim or (glu_width(d_model) if is_glu else 4 * d_model)
    embed, ffn = {'embed': d_model}, {'ffn': width}
    make = functools.partial(ExpertProjection, num_experts, rngs=rngs)
    self.router = Router(d_model, num_experts, top_k, router, rngs=rngs)
    self.gate = make(embed, ffn, bias=bias) if is_glu else None
    self.up = make(embed, ffn, bias=bias)
    self.down = make(ffn, embed, bias=bias)
    if shared_dim:
      shared = GLU if is_glu else MLP
      self.shared = shared(
        d_model, shared_dim, activation, bias=bias, rngs=rngs
      )
    else:
      self.shared = None
    gates = shared_dim and shared_gate
    self.shared_gate = (
      Projection(embed, {'one': 1}, rngs=rngs) if gates else None
    )
    self.activation = activation
    self.limit, self.offset = limit, offset

  def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
    """Maps [B, T, D] to [B, T, D]."""
    logits = self.router.logits(x)
    weights, ids = self.router(logits)
    real = None
    if context is not None and context.segment_ids is not None:
      real = context.segment_ids != 0
    penalty, loads = self.router.penalty(logits, ids, real)
    tap('penalty', penalty)
    tap('expert_load', loads)
    y = self.mixed(x, weights, ids)
    if self.shared is not None:
      shared = self.shared(x)
      if self.shared_gate is not None:
        shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
      y = y + shared
    return y

  def mixed(self, x, weights, ids):
    """Returns the sum of the experts of each token, by their weights."""
    params = {'up': self.up.weight, 'down': self.down.weight}
    if self.gate is not None:
      params['gate'] = self.gate.weight
    if self.up.bias is not None:
      params |= {
        f'{name}_bias': getattr(self, name).bias
        for name in ('gate', 'up')
        if name in params
      }

    def run(tokens, params, first):
      x, weights, ids = (a.reshape(-1, a.shape[-1]) for a in tokens)
      expert = functools.partial(self.expert, params)
      y = mix_experts(
        x, ids, weights, expert, num_experts=len(params['up']), first=first
      )
      return y.reshape(tokens[0].shape)

    y = sharding.over_experts(
      run,
      (x, weights, ids),
      {name: p[...].astype(x.dtype) for name, p in params.items()},
      {name: p.axes for name, p in params.items()},
    )
    if self.down.bias is None:
      return y
    # Apart, as each device of the axis `tensor` has part of the sum above.
    chosen = one_hot(ids, self.router.num_experts)
    gates = jnp.sum(jnp.where(chosen, weights[..., None], 0), axis=2)
    bias = sharding.constrain(self.down.bias[...], None, None)
    added = jnp.einsum(
      'bte,ed->btd',
      gates,
      bias.astype(gates.dtype),
      precision=jax.lax.Precision.HIGHEST,
    )
    return y + added.astype(y.dtype)

  def expert(self, params, rows, sizes):
    """Maps rows [R, D], of which sizes[e] are expert e's, to [R, D]."""

    def project(name):
      y = grouped_dot(rows, params[name], sizes)
      bias = params.get(f'{name}_bias')
      if bias is not None:
        ones = jnp.ones((len(rows), 1), rows.dtype)
        y = y + grouped_dot(ones, bias[:, None], sizes)
      return y

    up = project('up')
    if self.gate is None:
      hidden = self.activation(up)
    else:
      gate = project('gate')
      hidden = gated(gate, up, self.activation, self.limit, self.offset)
    return grouped_dot(hidden, params['down'], sizes)
