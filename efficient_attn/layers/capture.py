"""Captures values inside of a model by name, as hidden states to distil.

  (logits, _), found = captured(model, 'block')(tokens)
  hidden = found['block'][i]  # behind layer i

A layer names a value by `tap`; a captured call returns it beside the result, an
array for each layer in their order. All is functional: it can be compiled and
differentiated, and a model that is not captured is the same program as one
without taps. A value leaves a transformation of JAX as one more output:

  scan, passing   by which layers are scanned and checkpointed
  jit, grad, vmap  around a whole call: `jax.jit(captured(f, 'block'))`

Blocks tap `mixer` and `ffn`, what is added to the residual stream, and `block`,
the stream behind; softmax attention its heads: `query`, `key` and `value` as
they enter the logits, and `raw_key`, not yet normalised nor rotated; a mixture
of experts its `penalty` and `expert_load`.
"""

import contextvars
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

Values = dict[str, list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Open:
  """A call that is being captured.

  Attributes:
    values: of the names that are wanted, in the order of the taps.
    seen: all names that were tapped.
    trace: the transformation that it began in, where its values may live.
  """

  values: Values
  seen: set[str]
  trace: object


_OPEN = contextvars.ContextVar('capture', default=None)


def _trace():
  return get_opaque_trace_state(convention='nnx')


def tap(name: str, x: jax.Array) -> jax.Array:
  """Returns x, which whoever captures `name` gets too."""
  found = _OPEN.get()
  if found is None:
    return x
  found.seen.add(name)
  if name in found.values:
    if found.trace != _trace():
      raise ValueError(
        f'{name!r} is captured outside of a transformation that it lives in; '
        'capture inside: jax.jit(captured(f, ...))'
      )
    found.values[name].append(x)
  return x


def captured(f: Callable, *names: str) -> Callable:
  """Returns f that also returns the values it taps.

  Args:
    f: a model, or a function that calls one; not yet a `jax.jit`.
    *names: of the values.

  Returns:
    (*args) -> (f(*args), {name: [value of each tap, in order]}).
  """

  def call(*args, **kwargs):
    outer = _OPEN.get()
    seen = set() if outer is None else outer.seen
    wanted = {*names, *(outer.values if outer else ())}
    result, found = _collecting(f, wanted, seen)(*args, **kwargs)
    for name in names:
      if not found[name]:
        raise ValueError(
          f'nothing is tapped as {name!r}, only {sorted(seen)}; capture a '
          'compiled function inside: jax.jit(captured(f, ...))'
        )
    _hand_on(found)
    return result, {name: found[name] for name in names}

  return call


def passing(transform: Callable, f: Callable) -> Callable:
  """Returns transform(f), out of which tapped values pass.

  Args:
    transform: of functions to functions, as `jax.checkpoint` or `jax.vmap`.
    f: the function.
  """

  def call(*args):
    result, found = transform(_collecting(f, *_wanted()))(*args)
    _hand_on(found)
    return result

  return call


def scan(body: Callable, carry, xs):
  """Scans like `jax.lax.scan`; the taps of each step are values apart."""
  body = _collecting(body, *_wanted())

  def step(carry, x):
    (carry, y), found = body(carry, x)
    return carry, (y, found)

  carry, (ys, found) = jax.lax.scan(step, carry, xs)
  # The gradient of a split is one concatenation; that of slices adds up.
  steps = {
    name: zip(*(jnp.split(x, len(x)) for x in arrays), strict=True)
    for name, arrays in found.items()
  }
  _hand_on({k: [x[0] for step in v for x in step] for k, v in steps.items()})
  return carry, ys


def _wanted() -> tuple[set[str], set[str]]:
  """Returns the names wanted here, and the set of those seen."""
  found = _OPEN.get()
  return (set(), set()) if found is None else (set(found.values), found.seen)


def _collecting(f, wanted, seen):
  """Returns (*args) -> (f(*args), values by name)."""

  def call(*args, **kwargs):
    found = _Open({name: [] for name in sorted(wanted)}, seen, _trace())
    token = _OPEN.set(found)
    try:
      return f(*args, **kwargs), found.values
    finally:
      _OPEN.reset(token)

  return call


def _hand_on(values: Values) -> None:
  """Adds values to those that the call around captures."""
  found = _OPEN.get()
  if found is not None:
    for name in found.values:
      found.values[name] += values[name]
