"""Gates per head as sums within a chunk, and resets as masks.

A reset is where a segment begins, or where a gate is below RESET: a sum that
-1000 went into has lost the digits of the gates around it.
"""

import jax
import jax.numpy as jnp

from efficient_attn.kernels.layout import (
  CHUNK,
  by_head,
  by_program,
  by_token,
)

# e^RESET is 1e-26: what it lets through is below float32 rounding.
RESET = -60.0


class Gate:
  """The gate of one head in one chunk, see `prepare`.

  Attributes:
    ends: [1, C], the last token of the segment of a key.
    starts: [1, C], the first token of the segment of a query.
    keeps: [1, 1], whether the state before the chunk lives on after it.
    total: [1, 1], the decay of the chunk.
  """

  def __init__(self, rows_ref, columns_ref, head, sizes):
    def row(i):
      i = i * sizes.heads + head
      return rows_ref[0, 0, 0, i : i + 1]

    starts, ends, *self._rows = map(row, range(2 + parts(sizes)))
    columns = columns_ref[0, 0]
    self._columns = [
      jnp.broadcast_to(columns[:, i : i + 1], (CHUNK, CHUNK))
      for i in range(head, parts(sizes) * sizes.heads, sizes.heads)
    ]
    self.starts, self.ends = starts.astype(jnp.int32), ends.astype(jnp.int32)
    first, last = self.starts[:, :1], self.starts[:, CHUNK - 1 :]
    self._reading = jnp.where(first < 0, self.ends[:, :1] + 1, 0)
    self._writing = last
    self.keeps = last < 0
    self.total = jnp.exp(sum(row[:, CHUNK - 1 :] for row in self._rows))

  def spans(self):
    """b_i - b_j, [C, C]."""
    return sum(
      column - row
      for row, column in zip(self._rows, self._columns, strict=True)
    )

  def before(self, width):
    """e^b, [C, width]."""
    return _across(jnp.exp(sum(self._columns)), width)

  def after(self, width):
    """e^(b_C - b), [C, width]."""
    return _across(
      jnp.exp(
        sum(
          row[:, CHUNK - 1 :] - column
          for row, column in zip(self._rows, self._columns, strict=True)
        )
      ),
      width,
    )

  def reads(self, width):
    """Whether a token reads the state before the chunk, [C, width]."""
    return _tokens(width) < self._reading

  def writes(self, width):
    """Whether what a token writes is left after the chunk, [C, width]."""
    return _tokens(width) >= self._writing


def _across(x, width):
  """[C, C] of equal columns to [C, width]."""
  return x if width == CHUNK else jnp.broadcast_to(x[:, :1], (CHUNK, width))


def _tokens(width):
  return jax.lax.broadcasted_iota(jnp.int32, (CHUNK, width), 0)


def parts(sizes):
  """In how many arrays the sums of gates stand."""
  return 2 if sizes.operand == jnp.float32 else 1


def prepare(log_decay, starts, sizes, strength=None):
  """What the kernels know of the gates and segments of all chunks.

  Args:
    log_decay: [B | 1, T, K, G, 1] or None.
    starts: [B, T], whether a segment begins, or None.
    sizes: of the call.
    strength: of the writes, [B, N, T], or None.

  Returns:
    rows: [B, programs, chunks, R * heads, C]: the first token of a token's
      segment (-1 where it began before the chunk), the last token of it, b in
      one or two parts, and the strength.
    columns: [B, programs, T, P * heads]: the parts of b, and the strength.
    resets: [B, N, T].
  """
  shape = (sizes.batch, sizes.kv_heads * sizes.group, sizes.chunks * CHUNK)
  gate = jnp.zeros(shape, jnp.float32)
  if log_decay is not None:
    gate = by_head(log_decay, sizes, jnp.float32)[..., 0]
  resets = gate < RESET
  if starts is not None:
    missing = shape[-1] - sizes.length
    resets |= jnp.pad(starts, ((0, 0), (0, missing)))[:, None]
  gate = jnp.where(resets, 0, gate)
  chunks = (*shape[:2], sizes.chunks, CHUNK)
  terms = [gate]
  if parts(sizes) == 2:
    # Sums of sixteenths are exact, so that strong gates lose no digit.
    coarse = jnp.round(gate * 16) / 16
    terms = [coarse, gate - coarse]
  sums = [jnp.cumsum(x.reshape(chunks), -1) for x in terms]
  if strength is not None:
    sums.append(strength)
  index = jnp.arange(CHUNK)
  cuts = resets.reshape(chunks)
  first = jax.lax.cummax(jnp.where(cuts, index, -1), axis=3)
  following = jax.lax.cummin(
    jnp.where(cuts, index, CHUNK), axis=3, reverse=True
  )
  following = jnp.pad(
    following[..., 1:], [(0, 0)] * 3 + [(0, 1)], constant_values=CHUNK
  )
  rows = [x.astype(jnp.float32) for x in (first, following - 1)] + sums
  rows = [by_program(x.reshape(shape), sizes) for x in rows]
  columns = [
    jnp.swapaxes(
      x.reshape(shape[0], sizes.programs, sizes.heads, shape[2]), 2, 3
    )
    for x in sums
  ]
  return jnp.concatenate(rows, 3), jnp.concatenate(columns, 3), resets


def gate_cotangent(d_sum, resets, log_decay, sizes):
  """The gradient of `log_decay` from that of b, [B, N, T]; None without it."""
  if log_decay is None:
    return None
  d_sum = d_sum.reshape(*resets.shape[:2], sizes.chunks, CHUNK)
  d_gate = jax.lax.cumsum(d_sum, axis=3, reverse=True)
  d_gate = jnp.where(resets, 0, d_gate.reshape(resets.shape))
  return by_token(d_gate[..., None], log_decay)
