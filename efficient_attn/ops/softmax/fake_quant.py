"""Fake quantisation: values that a low-precision format can hold, in float32.

    x^ = s round((x - z) / s) + z,   s = max |x - z| / limit over each group

One scale s for each group of neighbours; `round` is to the nearest number of
the format, ties to even, saturating at its limit. The zero point z is 0, and
the least value of the group in the unsigned formats (KIVI, arXiv:2402.02750),
whose codes are 0 to 2^bits - 1. With `scale_format` the scales are rounded too,
as in NVFP4: 16 values of E2M1 share one of E4M3. Products of such values in
float32 are what a tensor core computes, up to the width of its accumulator.
There is no gradient: rounding is a staircase.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Format: its dtype, None for integers, and its largest number.
FORMATS = {
  'int8': (None, 127.0),
  'int4': (None, 7.0),
  'uint8': (None, 255.0),
  'uint4': (None, 15.0),
  'uint2': (None, 3.0),
  'e4m3': (jnp.float8_e4m3fn, 448.0),
  'e5m2': (jnp.float8_e5m2, 57344.0),
  'e2m1': (jnp.float4_e2m1fn, 6.0),
}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_to(x: Float[Array, '*shape'], form: str) -> Float[Array, '*shape']:
  """The nearest number of a format, ties to even, at most its largest."""
  dtype, limit = FORMATS[form]
  x = jnp.clip(x, 0 if form.startswith('uint') else -limit, limit)
  return jnp.round(x) if dtype is None else x.astype(dtype).astype(x.dtype)


@round_to.defjvp
def _no_gradient(form, primals, tangents):
  raise NotImplementedError(
    f'rounding to {form} has no gradient; differentiate ops.attention instead.'
  )


def fake_quant(
  x: Float[Array, '*shape'],
  form: str,
  group: tuple[int | None, ...],
  *,
  scale_format: str | None = None,
) -> Float[Array, '*shape']:
  """Rounds `x` to a format with one scale for each group.

  Args:
    x: values.
    form: a name in `FORMATS`.
    group: how many neighbours share a scale along each axis, None for all;
      the last group of an axis may be smaller.
    scale_format: the format of the scales, float32 by default.

  Returns:
    The rounded values, in at least float32.
  """
  if form not in FORMATS:
    raise ValueError(f'form = {form!r}: pass one of {", ".join(FORMATS)}.')
  if len(group) != x.ndim:
    raise ValueError(
      f'group = {group} must have one size for each axis of {x.shape}.'
    )
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  sizes = [
    min(size or length, length)
    for size, length in zip(group, x.shape, strict=True)
  ]
  pads = [(0, -n % size) for n, size in zip(x.shape, sizes, strict=True)]
  padded = jnp.pad(x, pads, mode='edge')
  counts = [n // size for n, size in zip(padded.shape, sizes, strict=True)]
  split = padded.reshape(
    [n for pair in zip(counts, sizes, strict=True) for n in pair]
  )
  axes = tuple(range(1, split.ndim, 2))
  zero = split.min(axes, keepdims=True) if form.startswith('uint') else 0
  scale = jnp.abs(split - zero).max(axes, keepdims=True) / FORMATS[form][1]
  if scale_format is not None:
    scale = round_to(scale, scale_format)
  safe = jnp.where(scale > 0, scale, 1)
  split = round_to((split - zero) / safe, form) * scale + zero
  whole = split.reshape(padded.shape)
  return whole[tuple(slice(length) for length in x.shape)]
