"""The time mixing of RWKV-4: a softmax over the past of every channel.

  o_t = (a_{t-1} + e^(u + k_t) v_t) / (b_{t-1} + e^(u + k_t))
  a_t = e^w a_{t-1} + e^(k_t) v_t      b_t = e^w b_{t-1} + e^(k_t)

with sums kept relative to e^(m_t), m_t = max(m_{t-1} + w, k_t). The tokens of a
tile are composed in three steps, first their maxima, then the sums, whose
decays e^(m_{t-1} + w - m_t) are at most 1 (see `channels`). The backward pass
computes the sums of a chunk again from those before it, and composes the
cotangents of the sums before each token in the other direction. Maxima are
constants.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_attn.kernels.scan.channels import (
  CHUNK,
  TILE,
  Blocks,
  composed,
  kept,
  neighbours,
  over_tiles,
  rows,
)

# The channels that run side by side: more hide latency until they spill.
LANES = {'forward': 512, 'backward': 256}
NONE = -jnp.inf


@functools.partial(jax.jit, static_argnames=('save', 'interpret'))
def forward(k, v, w, u, state, starts, *, save, interpret):
  """The outputs and the last state.

  Args:
    k: [B, G, T, W], see `channels.by_group`.
    v: [B, G, T, W].
    w: [G, 1, W], float32.
    u: [G, 1, W], float32.
    state: before token 0: both sums and their maximum, -inf where there is
      nothing, each [B, G, 1, W] in float32.
    starts: [B, T], whether a segment begins, or None.
    save: whether to return the states before every chunk.
    interpret: see `pl.pallas_call`.

  Returns:
    out [B, G, chunks * CHUNK, W] in the dtype of v, the last state and, if
    `save`, the states before every chunk, [chunks, B, G, 1, W] each.
  """
  blocks = Blocks(k, backward=False)
  marks = _marks(starts, blocks)
  first = state[0].shape
  outputs = [
    blocks.results(v.dtype),
    *[(first, jnp.float32, blocks.state())] * 3,
    *[((blocks.chunks, *first), jnp.float32, blocks.states())] * 3,
  ]
  out, *states = blocks.call(
    functools.partial(_forward, marked=bool(marks)),
    [
      *marks,
      blocks.tokens(k),
      blocks.tokens(v),
      *((x, blocks.constants()) for x in (w, u)),
      *((x, blocks.state()) for x in state),
    ],
    outputs if save else outputs[:4],
    0,
    lanes=LANES['forward'],
    name='wkv4_forward',
    work=40,
    interpret=interpret,
  )
  return out, tuple(states[:3]), *([tuple(states[3:])] if save else [])


def _marks(starts, blocks):
  """1 where a segment begins and 2 where no token is, if there is either."""
  missing = blocks.chunks * CHUNK - blocks.length
  if starts is None and not missing:
    return []
  if starts is None:
    starts = jnp.zeros((1, blocks.length), bool)
  marks = jnp.pad(
    starts.astype(jnp.float32), ((0, 0), (0, missing)), constant_values=2
  )
  return [blocks.tokens(marks[:, None, :, None])]


class _Tile:
  """Tokens of a tile [groups, 8, lanes], after a state.

  Attributes:
    k: -inf where there is no token.
    v: values.
    starts: whether a segment begins, or None.
    missing: whether there is no token, or None.
    before: the maximum before each token, -inf where there is nothing.
    after: that with it.
    decay: of the sums before each token.
    here: what a token adds to the lower sum.
  """

  def __init__(self, refs, part, i):
    marks_ref, k_ref, v_ref, w_ref, u_ref = refs
    k, self.v = (
      ref[part.tile(i)].astype(jnp.float32) for ref in (k_ref, v_ref)
    )
    w = jnp.broadcast_to(w_ref[part.constant], k.shape)
    self.starts = self.missing = None
    if marks_ref is not None:
      mark = jnp.broadcast_to(marks_ref[0, :, rows(i)], k.shape)
      self.starts, self.missing = mark == 1, mark == 2
      k = jnp.where(self.missing, NONE, k)
      w = jnp.where(self.missing, 0, w)
    self.k, self._w, self._bonus = k, w, u_ref[part.constant]

  def maxima(self, top):
    """Finds the maxima, after `top` [groups, 1, lanes]."""
    after, w = self.k, self._w
    if self.starts is not None:
      w = jnp.where(self.starts, NONE, w)
    size = 1
    while size < TILE:
      moved = neighbours(after, size, NONE, reverse=False)
      after = jnp.maximum(after, _moved(moved, w))
      w = w + neighbours(w, size, 0, reverse=False)
      size *= 2
    after = jnp.maximum(after, _moved(top, w))
    self.given(_past(after, top, self.starts), after)

  def given(self, before, after):
    """Takes the maxima before and with every token as they are."""
    self.before, self.after = before, after
    self.decay = jnp.exp(before + self._w - after)
    self.here = jnp.exp(self.k - after)

  def sums(self, past):
    """Both sums after every token, from those before the tile."""
    total, found = composed(
      self.decay, [self.here * self.v, self.here], reverse=False
    )
    return [x + kept(total, s) for x, s in zip(found, past, strict=True)]

  def weights(self):
    """Those of the sums before a token and of the token, in what it reads."""
    bonus = self._bonus + self.k
    shift = jnp.maximum(self.before, bonus)
    return jnp.exp(_moved(-shift, self.before)), jnp.exp(bonus - shift)

  def read(self, past):
    """The output, and the weights divided by the denominator."""
    old, own = self.weights()
    num, den = (kept(old, x) for x in past)
    den = den + own
    return (num + own * self.v) / den, old / den, own / den


def _moved(top, w):
  """Adds the gate w to top; one of -inf forgets NaN too."""
  return jnp.where(w == NONE, w, top + w)


def _past(x, edge, starts):
  """The maxima before the tokens of a tile."""
  before = neighbours(x, 1, edge, reverse=False)
  return before if starts is None else jnp.where(starts, NONE, before)


def _split(refs, marked):
  return refs if marked else (None, *refs)


def _forward(parts, *refs, marked):
  refs = _split(refs, marked)
  tokens, (*firsts, out_ref), refs = refs[:5], refs[5:9], refs[9:]
  lasts, states = refs[:3], refs[3:]

  @pl.when(pl.program_id(1) == 0)
  def _():
    for last, first in zip(lasts, firsts, strict=True):
      last[...] = first[...]

  for ref, last in zip(states, lasts, strict=bool(states)):
    ref[0] = last[...]

  def of(part):
    def tile(i, carry):
      *sums, top = carry
      own = _Tile(tokens, part, i)
      own.maxima(top)
      after = own.sums(sums)
      past = [
        neighbours(x, 1, s, reverse=False)
        for x, s in zip(after, sums, strict=True)
      ]
      out, _, _ = own.read(past)
      out_ref[part.tile(i)] = out.astype(out_ref.dtype)
      return [x[:, TILE - 1 :] for x in (*after, own.after)]

    found = over_tiles(tile, [ref[part.state] for ref in lasts])
    for ref, x in zip(lasts, found, strict=True):
      ref[part.state] = x

  parts.each(of)


@functools.partial(jax.jit, static_argnames='interpret')
def backward(k, v, w, u, starts, states, d_out, d_sums, *, interpret):
  """The cotangents of k, v, w, u and the first sums.

  Takes the arguments and the states of `forward`, and the cotangents of its
  outputs and last sums. Those of tokens are [B, G, chunks * CHUNK, W], those of
  w and u [B, G, 1, W], of each sequence.
  """
  blocks = Blocks(k, backward=True)
  marks = _marks(starts, blocks)
  one = d_sums[0].shape, jnp.float32, blocks.state()
  d_k, d_v, *others = blocks.call(
    functools.partial(_backward, marked=bool(marks)),
    [
      *marks,
      blocks.tokens(k),
      blocks.tokens(v),
      *((x, blocks.constants()) for x in (w, u)),
      *((x, blocks.states()) for x in states),
      blocks.tokens(d_out),
      *((x, blocks.state()) for x in d_sums),
    ],
    [blocks.results(k.dtype), blocks.results(v.dtype), *[one] * 4],
    4,
    lanes=LANES['backward'],
    name='wkv4_backward',
    work=90,
    interpret=interpret,
  )
  d_w, d_u, *firsts = others
  return d_k, d_v, d_w, d_u, tuple(firsts)


def _backward(parts, *refs, marked):
  refs = _split(refs, marked)
  tokens, states, refs = refs[:5], refs[5:8], refs[8:]
  d_out_ref, *d_lasts = refs[:3]
  d_k_ref, d_v_ref, d_w_ref, d_u_ref, *d_firsts = refs[3:9]
  *past_refs, before_ref, after_ref = refs[9:]

  @pl.when(pl.program_id(1) == 0)
  def _():
    for ref, last in zip(d_firsts, d_lasts, strict=True):
      ref[...] = last[...]
    d_w_ref[...] = jnp.zeros_like(d_w_ref)
    d_u_ref[...] = jnp.zeros_like(d_u_ref)

  def of(part):
    def again(i, carry):
      *sums, top = carry
      own = _Tile(tokens, part, i)
      own.maxima(top)
      after = own.sums(sums)
      for ref, x, s in zip(past_refs, after, sums, strict=True):
        ref[:, rows(i)] = neighbours(x, 1, s, reverse=False)
      before_ref[:, rows(i)] = own.before
      after_ref[:, rows(i)] = own.after
      return [x[:, TILE - 1 :] for x in (*after, own.after)]

    over_tiles(again, [ref[part.states] for ref in states])

    def tile(i, carry):
      *d_after, d_w, d_u = carry
      own = _Tile(tokens, part, i)
      own.given(before_ref[:, rows(i)], after_ref[:, rows(i)])
      past = [ref[:, rows(i)] for ref in past_refs]
      d_out = d_out_ref[part.tile(i)].astype(jnp.float32)
      out, old, new = own.read(past)
      # Of the sums before every token, what it reads and all later ones.
      total, found = composed(
        own.decay, [old * d_out, -old * d_out * out], reverse=True
      )
      found = [x + kept(total, d) for x, d in zip(found, d_after, strict=True)]
      d_num, d_den = (
        neighbours(x, 1, d, reverse=True)
        for x, d in zip(found, d_after, strict=True)
      )
      d_bonus = new * d_out * (own.v - out)
      d_k = d_bonus + own.here * (d_num * own.v + d_den)
      d_v = new * d_out + own.here * d_num
      d_k_ref[part.tile(i)] = d_k.astype(d_k_ref.dtype)
      d_v_ref[part.tile(i)] = d_v.astype(d_v_ref.dtype)
      d_gate = kept(own.decay, d_num * past[0] + d_den * past[1])
      if own.missing is not None:
        d_gate = jnp.where(own.missing, 0, d_gate)
      d_w += jnp.sum(d_gate, 1, keepdims=True)
      d_u += jnp.sum(d_bonus, 1, keepdims=True)
      return *(x[:, :1] for x in found), d_w, d_u

    ends = (*d_firsts, d_w_ref, d_u_ref)
    found = over_tiles(
      tile, tuple(ref[part.state] for ref in ends), reverse=True
    )
    for ref, x in zip(ends, found, strict=True):
      ref[part.state] = x

  parts.each(of)
