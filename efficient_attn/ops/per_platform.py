"""Functions whose implementation is chosen when a program is lowered.

The platform is known when a program is lowered, not when it is traced: one
trace may be exported for several platforms, or compiled for a TPU on a host
without one. So kernels are traced, and Pallas is imported, only when they are
lowered. (`jax.lax.platform_dependent` traces every branch, which costs a CPU
the kernels of a TPU.)

Gradients are kernels too. `differentiable` gives a function forward mode by
its definition, and reverse mode by a forward pass that saves residuals and a
backward pass that takes them, each chosen per platform. Second derivatives
differentiate the definitions of both.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.interpreters import ad, batching, mlir, partial_eval

PLATFORMS = ('cpu', 'tpu', 'cuda', 'rocm')

# The name of what a forward pass leaves: results, and residuals such as states.
# A policy of `jax.checkpoint` that keeps it does not run the kernel again.
KEPT = 'kernel'


def per_platform(
  definition: Callable,
  kernels: Mapping[str | None, Callable],
  *args: Any,
  partitionable: Mapping[str, Callable] = {},
) -> Any:
  """Calls the kernel of the platform being lowered for, else the definition.

  Args:
    definition: plain JAX; derivatives are taken of it. It closes over no
      array.
    kernels: functions of the same arguments and results by platform; None
      stands for every platform without an entry. Traced when lowered.
    *args: pytrees of arrays.
    partitionable: the same for kernels that are plain JAX, which XLA can
      divide among devices; where `kernels` cannot be taken.
  """
  leaves, tree = jax.tree.flatten(args)
  results = None

  def flat(*leaves):
    nonlocal results
    out, results = jax.tree.flatten(definition(*tree.unflatten(leaves)))
    return out

  def flattened(kernel):
    return lambda *leaves: jax.tree.leaves(kernel(*tree.unflatten(leaves)))

  jaxpr = _without_dead_code(jax.make_jaxpr(flat)(*leaves))
  kernels, partitionable = (
    tuple((p, flattened(kernel)) for p, kernel in table.items())
    for table in (kernels, partitionable)
  )
  return results.unflatten(
    _per_platform.bind(
      *leaves, jaxpr=jaxpr, kernels=kernels, partitionable=partitionable
    )
  )


def _without_dead_code(jaxpr):
  """Drops what no result needs, as the compiler will, in loops too.

  A backward pass is written with `jax.vjp`, whose forward half is often not
  needed in full; it should cost nothing to lower, and not be counted.
  """
  live, _ = partial_eval.dce_jaxpr(
    jaxpr.jaxpr, [True] * len(jaxpr.out_avals), instantiate=True
  )
  return core.ClosedJaxpr(live, jaxpr.consts)


_per_platform = core.Primitive('per_platform')
_per_platform.multiple_results = True


@_per_platform.def_impl
def _run(*args, **params):
  return jax.jit(functools.partial(_per_platform.bind, **params))(*args)


@_per_platform.def_abstract_eval
def _results(*args, jaxpr, **params):
  return jaxpr.out_avals


def _jvp(primals, tangents, *, jaxpr, **params):
  moved = [type(t) is not ad.Zero for t in tangents]
  return jax.jvp(
    _of_some(core.jaxpr_as_fun(jaxpr), primals, moved),
    _only(primals, moved),
    _only(tangents, moved),
  )


def _batch(args, axes, *, jaxpr, kernels, partitionable):
  def mapped(function):
    return jax.vmap(function, in_axes=tuple(axes))

  jaxpr = jax.make_jaxpr(mapped(core.jaxpr_as_fun(jaxpr)))(*args)
  kernels, partitionable = (
    tuple((p, mapped(kernel)) for p, kernel in table)
    for table in (kernels, partitionable)
  )
  out = _per_platform.bind(
    *args, jaxpr=jaxpr, kernels=kernels, partitionable=partitionable
  )
  return out, [0] * len(out)


def _lowering(platform):
  def lower(ctx, *args, jaxpr, kernels, partitionable):
    kernels = dict(kernels)
    function = kernels.get(platform, kernels.get(None))
    # XLA cannot partition a kernel: outside of shard_map a program of several
    # devices is the definition's.
    if function is None or (platform == 'tpu' and not _one_device(ctx)):
      function = dict(partitionable).get(platform, core.jaxpr_as_fun(jaxpr))
    return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

  return lower


def _one_device(ctx):
  axes = ctx.module_context.axis_context
  if isinstance(axes, mlir.ShardingContext):
    return axes.num_devices == 1
  return set(axes.manual_axes) == set(axes.mesh.axis_names)


ad.primitive_jvps[_per_platform] = _jvp
batching.primitive_batchers[_per_platform] = _batch
mlir.register_lowering(_per_platform, _lowering(None))
for _platform in PLATFORMS:
  mlir.register_lowering(
    _per_platform, _lowering(_platform), platform=_platform
  )


def differentiable(
  call: Callable, forward: Callable, backward: Callable, definition: Callable
) -> Callable:
  """Returns `call` with a gradient of its own.

  Args:
    call: maps pytrees of arrays to a pytree of floating arrays.
    forward: maps the same to (outputs, residuals).
    backward: maps (args, residuals, cotangents) to the cotangents of args,
      with None for integers.
    definition: plain JAX, which forward mode differentiates.
  """
  function = jax.custom_jvp(call)

  @functools.partial(function.defjvp, symbolic_zeros=True)
  def jvp(primals, tangents):
    out, residuals = checkpoint_name(forward(*primals), KEPT)
    return out, _tangent(
      definition, backward, primals, residuals, tangents, out
    )

  return function


def _tangent(definition, backward, primals, residuals, tangents, out):
  """The tangent of `definition`, whose transpose is `backward`."""
  args, tree = jax.tree.flatten(primals)
  saved, saved_tree = jax.tree.flatten(residuals)
  results, results_tree = jax.tree.flatten(out)
  tangents = tree.flatten_up_to(tangents)
  moved = [type(t) is not SymbolicZero for t in tangents]
  count = len(args)

  def flat(*args):
    return jax.tree.leaves(definition(*tree.unflatten(args)))

  def push(fixed, given):
    args = fixed[:count]
    some = _of_some(flat, args, moved)
    return jax.jvp(some, _only(args, moved), list(given))[1]

  def pull(fixed, cotangents):
    found = backward(
      tree.unflatten(fixed[:count]),
      saved_tree.unflatten(fixed[count:]),
      results_tree.unflatten(cotangents),
    )
    return _only(tree.flatten_up_to(found), moved)

  fixed = [*args, *saved]
  return results_tree.unflatten(
    _linear.bind(
      *fixed,
      *_only(tangents, moved),
      push=push,
      pull=pull,
      count=len(fixed),
      avals=tuple(map(jax.typeof, results)),
    )
  )


# A map that is linear in all arguments but the first `count`: `push` it, with
# its transpose `pull`.
_linear = core.Primitive('linear_with_transpose')
_linear.multiple_results = True


@_linear.def_impl
def _pushed(*args, push, count, **params):
  return push(args[:count], args[count:])


@_linear.def_abstract_eval
def _linear_results(*args, avals, **params):
  return avals


def _linear_jvp(primals, tangents, **params):
  count = params['count']
  out = _linear.bind(*primals, **params)
  if all(type(t) is ad.Zero for t in tangents[:count]):
    given = map(ad.instantiate_zeros, tangents[count:])
    return out, _linear.bind(*primals[:count], *given, **params)
  moved = [type(t) is not ad.Zero for t in tangents]
  function = _of_some(functools.partial(_pushed, **params), primals, moved)
  primals, tangents = _only(primals, moved), _only(tangents, moved)
  return out, jax.jvp(function, primals, tangents)[1]


def _linear_transpose(cotangents, *args, pull, count, **params):
  cotangents = list(map(ad.instantiate_zeros, cotangents))
  return [None] * count + pull(list(args[:count]), cotangents)


def _linear_batch(args, axes, *, push, pull, count, avals):
  size = next(
    x.shape[a] for x, a in zip(args, axes, strict=True) if a is not None
  )
  fixed, fixed_axes = args[:count], list(axes[:count])
  given = [
    jnp.broadcast_to(x, (size, *x.shape))
    if a is None
    else jnp.moveaxis(x, a, 0)
    for x, a in zip(args[count:], axes[count:], strict=True)
  ]

  def mapped(function):
    return jax.vmap(function, in_axes=(fixed_axes, 0))

  def push_all(fixed, given):
    return mapped(push)(list(fixed), list(given))

  def pull_all(fixed, cotangents):
    return mapped(pull)(list(fixed), cotangents)

  shapes = jax.make_jaxpr(push_all)(fixed, given)
  out = _linear.bind(
    *fixed,
    *given,
    push=push_all,
    pull=pull_all,
    count=count,
    avals=tuple(shapes.out_avals),
  )
  return out, [0] * len(out)


ad.primitive_jvps[_linear] = _linear_jvp
ad.primitive_transposes[_linear] = _linear_transpose
batching.primitive_batchers[_linear] = _linear_batch
mlir.register_lowering(_linear, mlir.lower_fun(_pushed, multiple_results=True))


def _only(items, kept):
  return [item for item, keep in zip(items, kept, strict=True) if keep]


def _of_some(function, args, moved):
  """`function` of the moved arguments alone, the others as they are."""

  def of_moved(*some):
    some = iter(some)
    return function(
      *(next(some) if m else x for x, m in zip(args, moved, strict=True))
    )

  return of_moved
