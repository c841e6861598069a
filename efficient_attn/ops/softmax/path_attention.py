"""PaTH attention (Yang et al. 2505.16381): positions from Householder products.

  o_t = sum_{s <= t} softmax_s(scale q_t^T A_ts k_s + F_ts) v_s
  A_ts = G_t G_{t-1} ... G_{s+1},     G_t = I - beta_t w_t w_t^T
  F_ts = sum_{l in (s, t]} log_forget_l              (PaTH-FoX, else zero)

so every token turns all keys before it, k_s <- G_t k_s, and then attends; the
cache holds the turned keys. Over a block of C tokens the product is
G_C ... G_1 = I - W^T Y, where with L = tril(W W^T, -1)

  Y = (I + diag(beta) L)^-1 diag(beta) W,

and a block's own logits and turned keys need one more such solve. The
blockwise form carries the queries of one block back over the blocks before
it. O(T^2 H) time for blocks of about H tokens, and O(T (C + H)) memory for one
row of blocks, forward and backward. `form='recurrent'` is the definition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from efficient_attn.ops import chunks, scores, shapes
from efficient_attn.ops.recurrent import triangular
from efficient_attn.ops.scores.forget import HARDEST

FORMS = ('blockwise', 'recurrent', 'parallel')


class Past(NamedTuple):
  """What decoding keeps, with room for S tokens.

  Attributes:
    key: [B, S, N, H], turned by every token since; float32.
    value: [B, S, N, V].
    forget: [B, S, N], the log forget gates since the key; float32.
    length: [], how many of the S tokens there are.
    start: [B], where the segment of the last one began; None: at 0.
  """

  key: Float[Array, 'B S N H']
  value: Float[Array, 'B S N V']
  forget: Float[Array, 'B S N']
  length: Int[Array, '']
  start: Int[Array, 'B'] | None = None


def path_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N V'],
  w: Float[Array, 'B T N H'],
  beta: Float[Array, 'B T N'],
  *,
  log_forget: Float[Array, 'B T N'] | None = None,
  scale: float | int | None = None,
  initial_state: Past | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  form: str | None = None,
  chunk_size: int = 64,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], Past | None]:
  """Causal softmax attention whose keys every later token reflects.

  Args:
    q: queries.
    k: keys.
    v: values.
    w: directions, of unit norm or less for a product that does not grow.
    beta: strengths in [0, 2]; 1 projects w out, 2 reflects.
    log_forget: <= 0, what each token subtracts from the logits of the keys
      before it. -inf hides them.
    scale: factor of the logits before the forget gates; None is H ** -0.5.
    initial_state: past tokens, with room for T more.
    segment_ids: a token reads only back to the last token whose id differs
      from the id of the token before it. Token 0 continues `initial_state`.
    form: 'blockwise', 'recurrent' (token by token) or 'parallel' (one block);
      None is 'recurrent' for one token and 'blockwise' otherwise.
    chunk_size: tokens per block, a power of two.
    implementation: None or 'xla'.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: the past with the new tokens; None where none was given.
  """
  _check(q, k, v, w, beta, log_forget, initial_state, segment_ids)
  if form is not None and form not in FORMS:
    raise ValueError(f'form = {form!r}: pass one of {FORMS}, or None.')
  if implementation not in (None, 'xla'):
    raise NotImplementedError(
      f'path_attention has no implementation {implementation!r}: pass None or '
      "'xla'."
    )
  batch, length, heads, channels = q.shape
  past = initial_state
  dtype = shapes.accumulator(q, k, v, w, beta, log_forget, past and past.key)
  if past:
    key, forget = past.key.astype(dtype), past.forget.astype(dtype)
    past = past._replace(key=key, forget=forget)
  scale = channels**-0.5 if scale is None else scale
  gate = jnp.zeros(beta.shape, dtype) if log_forget is None else log_forget
  gate = jnp.maximum(gate.astype(dtype), HARDEST)
  tokens = (scale * q.astype(dtype), *(x.astype(dtype) for x in (k, w, beta)))
  offset = past.length if past else 0
  starts = start = past and past.start
  if segment_ids is not None:
    before = jnp.zeros(batch, jnp.int32) if start is None else start
    starts = chunks.first_tokens(segment_ids, offset, before)
    start = starts[:, -1]
  elif start is not None:
    starts = jnp.broadcast_to(start[:, None], (batch, length))

  if form == 'recurrent' or (form is None and length == 1):
    empty = Past(
      jnp.zeros((batch, length, heads, channels), dtype),
      jnp.zeros_like(v),
      jnp.zeros((batch, length, heads), dtype),
      jnp.zeros((), jnp.int32),
    )
    out, state = _recurrent(*tokens, v, gate, past or empty, starts)
    return out.astype(v.dtype), state._replace(start=start) if past else None
  if form == 'parallel':
    chunk_size = 1 << (length - 1).bit_length()
  size = chunks.chunk_length(length, chunk_size)
  # A bias that is known to be zero is not computed.
  bias = gate if log_forget is not None or past else None
  out, turned = _blockwise(*tokens, v, bias, past, starts, size)
  if past is None:
    return out.astype(v.dtype), None

  def put(old, new):
    new = new.astype(old.dtype)
    return lax.dynamic_update_slice_in_dim(old, new, past.length, 1)

  since = lax.cumsum(gate, 1, reverse=True)
  later = jnp.pad(since[:, 1:], ((0, 0), (0, 1), (0, 0)))
  state = Past(
    key=put(turned[0], turned[1]),
    value=put(past.value, v),
    forget=put(past.forget + since[:, :1], later),
    length=past.length + length,
    start=start,
  )
  return out.astype(v.dtype), state


def _dot(spec, *operands):
  return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)


def _recurrent(q, k, w, beta, v, gate, past, starts):
  slots = jnp.arange(past.key.shape[1])

  def step(past, token):
    q, k, w, beta, v, gate, start = token
    along = _dot('bsnh,bnh->bsn', past.key, w) * beta[:, None]

    def put(old, new):
      new = new[:, None].astype(old.dtype)
      return lax.dynamic_update_slice_in_dim(old, new, past.length, 1)

    here = past._replace(
      key=put(past.key - along[..., None] * w[:, None], k),
      value=put(past.value, v),
      forget=put(past.forget + gate[:, None], jnp.zeros_like(gate)),
      length=past.length + 1,
    )
    mask = (slots <= past.length)[None]
    if start is not None:
      mask &= slots >= start[:, None]
    logits = _dot('bnh,bsnh->bsn', q, here.key) + here.forget
    logits = jnp.where(mask[..., None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=1)
    value = here.value.astype(weights.dtype)
    return here, _dot('bsn,bsnv->bnv', weights, value)

  tokens = q, k, w, beta, v, gate, starts
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  past, out = lax.scan(step, past, tokens)
  return jnp.moveaxis(out, 0, 1), past


def _blockwise(q, k, w, beta, v, gate, past, starts, size):
  """Returns out, and the keys of the past and of the tokens, turned."""
  batch, length, heads, channels = q.shape

  def blocks(x):  # [B, T, N, ...] to [blocks, B, N, C, ...]
    return jnp.swapaxes(chunks.to_chunks(x, size), 2, 3)

  q, k, w, value = (blocks(x) for x in (q, k, w, v.astype(q.dtype)))
  beta = blocks(beta)[..., None]
  local, q, k, product = _turn(q, k, w, beta)
  number = q.shape[0]
  total = number * size
  index = np.arange(total)
  if starts is not None:
    starts = jnp.pad(starts, ((0, 0), (0, total - length)), mode='edge')
  bias = before = None
  if gate is not None:
    padded = jnp.pad(gate, ((0, 0), (0, total - length), (0, 0)))
    bias = scores.Forget(padded)
    before = lax.cumsum(padded, 1)

  @jax.checkpoint
  def row(i):
    rows = i * size + jnp.arange(size)

    def back(q, block):
      j, product = block
      earlier = lax.cond(
        j < i, lambda: _dot('bnch,bnhg->bncg', q, product), lambda: q
      )
      return earlier, q

    steps = jnp.arange(number), product
    first, at = lax.scan(back, q[i], steps, reverse=True)
    logits = _dot('jbnch,jbnsh->bncjs', at, k)
    own = (jnp.arange(number) == i)[:, None]
    logits = jnp.where(own, local[i][..., None, :], logits)
    logits = logits.reshape(batch, heads, size, total)
    if bias is not None:
      logits = logits + bias.tile(rows, jnp.arange(total))
    mask = (rows[:, None] >= index)[None, None]
    if starts is not None:
      begun = starts[:, None, rows, None]
      mask &= index + (past.length if past else 0) >= begun
    logits = jnp.where(mask, logits, -jnp.inf)
    if past is not None:
      old = _dot('bnch,bsnh->bncs', first, past.key)
      old = old + jnp.swapaxes(past.forget, 1, 2)[:, :, None]
      old = old + jnp.swapaxes(before[:, rows], 1, 2)[..., None]
      slots = jnp.arange(old.shape[-1])
      there = slots < past.length
      if starts is not None:
        there &= slots >= begun
      logits = jnp.concatenate([jnp.where(there, old, -jnp.inf), logits], -1)
    weights = jax.nn.softmax(logits, axis=-1)
    new = weights[..., -total:].reshape(batch, heads, size, number, size)
    out = _dot('bncjs,jbnsv->bncv', new, value)
    if past is not None:
      seen = past.value.astype(out.dtype)
      out = out + _dot('bncs,bsnv->bncv', weights[..., :-total], seen)
    return out

  out = lax.map(row, jnp.arange(number))
  out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(batch, total, heads, -1)
  turned = None
  if past is not None:
    turned = _turned_keys(past.key, k, product, length)
  return out[:, :length], turned


def _turn(q, k, w, beta):
  """One block [.., C, H]: what its tokens do to its queries and keys.

  Returns:
    local: [.., C, C], the logits inside the block, at and below the diagonal.
    q: carried back to the start of the block.
    k: carried on to its end.
    product: [.., H, H], G_C ... G_1.
  """
  size, channels = q.shape[-2:]
  lower = np.tri(size, dtype=bool)
  strict = np.tri(size, k=-1, dtype=bool)

  def between(x, y, mask):
    return jnp.where(mask, _dot('...ih,...jh->...ij', x, y), 0)

  y, moves = jnp.split(
    triangular.solve_unit_lower(
      beta * between(w, w, strict),
      beta * jnp.concatenate([w, between(w, k, strict)], -1),
    ),
    [channels],
    axis=-1,
  )  # Column j of moves: how far along each later w the key k_j is moved.
  reads = between(q, w, lower)
  local = between(q, k, lower) - _dot('...is,...sj->...ij', reads, moves)
  product = np.eye(channels) - _dot('...sh,...sg->...hg', w, y)
  return (
    local,
    q - _dot('...is,...sh->...ih', reads, y),
    k - _dot('...sj,...sh->...jh', moves, w),
    product.astype(q.dtype),
  )


def _turned_keys(past, k, product, length):
  """Past [B, S, N, H] and block keys after all blocks, [B, T, N, H]."""
  number, batch, heads, size, channels = k.shape
  total = number * size

  def body(keys, block):
    j, k, product = block
    keys = [_dot('bnhg,bsng->bsnh', product, x) for x in keys]
    k = jnp.swapaxes(k, 1, 2)
    keys[1] = lax.dynamic_update_slice_in_dim(keys[1], k, j * size, 1)
    return keys, None

  fresh = jnp.zeros((batch, total, heads, channels), k.dtype)
  steps = jnp.arange(number), k, product
  (past, fresh), _ = lax.scan(body, [past.astype(k.dtype), fresh], steps)
  return past, fresh[:, :length]


def _check(q, k, v, w, beta, log_forget, past, segment_ids):
  shapes.check_qkv(q, k, v)
  if v.shape[2] != q.shape[2]:
    raise ValueError(
      f'v has {v.shape[2]} heads, q and k have {q.shape[2]}: repeat the heads '
      'of q, k and w.'
    )
  wanted = {
    'w': (w, q.shape),
    'beta': (beta, q.shape[:3]),
    'log_forget': (log_forget, q.shape[:3]),
    'segment_ids': (segment_ids, q.shape[:2]),
  }
  shapes.check_shapes(wanted)
  if log_forget is not None:
    shapes.check_log_decay(log_forget)
  if past is None:
    return
  batch, length, heads, channels = q.shape
  room = past.key.shape[1]
  lead = (batch, room, heads)
  wanted = {
    'initial_state.key': (past.key, (*lead, channels)),
    'initial_state.value': (past.value, (*lead, v.shape[-1])),
    'initial_state.forget': (past.forget, lead),
    'initial_state.length': (past.length, ()),
    'initial_state.start': (past.start, (batch,)),
  }
  shapes.check_shapes(wanted)
  if room < length:
    raise ValueError(
      f'initial_state has room for {room} tokens, fewer than T = {length}: '
      'make it as long as the whole sequence.'
    )
