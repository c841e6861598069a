"""LaCT: large-chunk test-time training (2505.23884).

The fast weights are a SwiGLU model per head,

  f(x) = W2^T (silu(W1^T x) * (W3^T x)),    loss_t = -f(k_t) . v_t,

which every token reads as it was before the chunk of the token, and which one
update per chunk trains on all its tokens (apply, then update):

  G_i = -sum_t eta_ti d loss_t / d W_i
  M_i <- mean_t(momentum_t) M_i + G_i       (without momentum: M_i = G_i)
  W_i <- normalize(W_i + muon(M_i))         (without Muon: + M_i)

`normalize` gives every output unit (column) the norm it had at the start of
the segment. Chunks of `chunk_size` tokens, thousands, count from the first
token of the segment. O(T (H + V) F) time per head in large products and
O(min(H, F)^2 max(H, F)) per chunk for Muon; the state is O((H + V) F).
"""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import mini_batches, muon

SwiGLU: TypeAlias = tuple[Array, Array, Array]  # W1, W2, W3, maybe with [B]


class LactState(NamedTuple):
  """What a chunk under way needs.

  Attributes:
    weights: W, as the tokens of the chunk read it.
    gradient: G of the tokens so far.
    velocity: M after the last whole chunk, None without momentum.
    momentum: [B, N], the sum of the momentum of the tokens so far, or None.
    count: [B], tokens so far, 0 to chunk_size.
  """

  weights: SwiGLU
  gradient: SwiGLU
  velocity: SwiGLU | None
  momentum: Float[Array, 'B N'] | None
  count: Int[Array, 'B']


def large_chunk_fast_weights(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N V'],
  learning_rate: Float[Array, 'B T N 3'],
  *,
  weights: SwiGLU,
  momentum: Float[Array, 'B T N'] | None = None,
  use_muon: bool = True,
  muon_steps: tuple[tuple[float, float, float], ...] = muon.TUNED,
  initial_state: LactState | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 2048,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], LactState | None]:
  """Reads a SwiGLU model, and trains it once per chunk.

  Args:
    q: queries.
    k: keys, used as given.
    v: values.
    learning_rate: eta of W1, W2 and W3; with Muon only the ratios between
      tokens matter.
    weights: W1 [N, H, F], W2 [N, F, V] and W3 [N, H, F] at the start of every
      segment.
    momentum: share of the last update that the next one repeats, 0 to 1.
    use_muon: orthogonalise updates with `muon.orthogonalize`.
    muon_steps: its steps, `muon.TUNED` or `muon.JORDAN`.
    initial_state: continues the sequence of an earlier call.
    segment_ids: the model is that of `weights` again at every token whose id
      differs from the id of the token before it.
    bidirectional: one update with all tokens, which all tokens then read.
    form: 'chunkwise', 'recurrent' (token by token) or None: the second for a
      single token.
    chunk_size: tokens per update, a power of two: a part of the definition.
    implementation: None or 'xla'.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: after the last token, float32 (float64 for float64 inputs); None
      when `bidirectional`.
  """
  mini_batches.check(form, implementation, 'lact')
  _check(q, k, v, learning_rate, weights, momentum)
  shapes.check_shapes({'segment_ids': (segment_ids, q.shape[:2])})
  dtype = shapes.accumulator(q, k, v, learning_rate, weights, momentum)
  weights = tuple(w.astype(dtype) for w in weights)
  fresh = fresh_state(weights, q.shape[0], momentum=momentum is not None)
  norms = tuple(muon.safe_norm(w, -2) for w in weights)
  learning_rate = learning_rate.astype(dtype)
  if momentum is not None:
    momentum = momentum.astype(dtype)[..., None]
  tokens = (q, k, v, learning_rate, momentum)
  steps = muon_steps if use_muon else None
  begin = functools.partial(_begin, norms=norms, steps=steps)
  if bidirectional:
    return _bidirectional(
      tokens, fresh, begin, initial_state, segment_ids
    ), None

  state = None
  if initial_state is not None:
    _check_state(initial_state, fresh)
    state = jax.tree.map(lambda x: x.astype(dtype), tuple(initial_state[:4]))
    state = state, initial_state.count
  out, state = mini_batches.recur(
    functools.partial(begin, size=chunk_size),
    _learn,
    tokens,
    tuple(fresh[:4]),
    state,
    segment_ids=segment_ids,
    form=form,
    chunk_size=chunk_size,
  )
  return out.astype(v.dtype), LactState(*state[0], state[1])


def fresh_state(
  weights: SwiGLU, batch: int, *, momentum: bool = False
) -> LactState:
  """Returns the state before the first token."""
  weights = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in weights)
  zeros = tuple(map(jnp.zeros_like, weights))
  return LactState(
    weights=weights,
    gradient=zeros,
    velocity=zeros if momentum else None,
    momentum=jnp.zeros_like(zeros[0][:, :, 0, 0]) if momentum else None,
    count=jnp.zeros(batch, jnp.int32),
  )


def _begin(carry, *, norms, size, steps):
  """The update with a whole chunk; without gradients nothing changes."""
  weights, gradient, velocity, momentum = carry
  step = gradient
  if velocity is not None:
    share = (momentum / size)[..., None, None]
    step = tuple(share * m + g for m, g in zip(velocity, gradient, strict=True))
    velocity, momentum = step, jnp.zeros_like(momentum)
  if steps is not None:
    step = tuple(muon.orthogonalize(x, steps=steps) for x in step)

  def update(w, d, norm):
    w = w + d
    return w * (norm / muon.safe_norm(w, -2))

  weights = tuple(map(update, weights, step, norms))
  return weights, tuple(map(jnp.zeros_like, gradient)), velocity, momentum


def _learn(carry, tokens, seen):
  """Tokens [B, N, C, X] of one chunk; see `mini_batches.recur`."""
  weights, gradient, velocity, momentum = carry
  q, k, v, rate, share = tokens
  learned = seen[:, -1][:, None, :, None]
  rate = jnp.where(learned, rate, 0)
  gradient = tuple(map(jnp.add, gradient, _gradient(weights, k, v, rate)))
  if momentum is not None:
    momentum = momentum + jnp.sum(jnp.where(learned, share, 0)[..., 0], -1)
  out = _apply(weights, q)
  return (weights, gradient, velocity, momentum), out


def _dot(spec, *xs, like):
  """A product of float32 weights and tokens, on operands as the tokens are."""
  dtype = jnp.promote_types(xs[-1].dtype, jnp.float32)
  operand = shapes.operand(dtype, *like)
  return product(spec, *xs, operand=operand, dtype=dtype)


def _apply(weights, x):
  w1, w2, w3 = weights
  layer = functools.partial(_dot, 'bnch,bnhf->bncf', like=[x])
  return layer(jax.nn.silu(layer(x, w1)) * layer(x, w3), w2)


def _gradient(weights, k, v, rate):
  """The sum over tokens of eta_i d (f(k) . v) / d W_i."""
  w1, w2, w3 = weights
  dot = functools.partial(_dot, like=[k, v])
  layer = functools.partial(dot, 'bnch,bnhf->bncf')
  gate, pull = jax.vjp(jax.nn.silu, layer(k, w1))
  up = layer(k, w3)
  error = dot('bncf,bnhf->bnch', v, w2)
  rates = jnp.split(rate, 3, -1)
  outer = functools.partial(dot, 'bnch,bncf->bnhf')
  return (
    outer(k, rates[0] * pull(error * up)[0]),
    outer(gate * up, rates[1] * v),
    outer(k, rates[2] * error * gate),
  )


def _bidirectional(tokens, fresh, begin, initial_state, segment_ids):
  shapes.check_directions(True, initial_state)
  if segment_ids is not None:
    raise NotImplementedError(
      'lact packs sequences only where it is causal: with bidirectional=True '
      'pass one sequence per row and no segment_ids.'
    )
  v = tokens[2]
  length = v.shape[1]
  tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, -2), tokens)
  seen = jnp.ones((1, 1, length), bool)  # the last row
  carry, _ = _learn(tuple(fresh[:4]), tokens, seen)
  weights, *_ = begin(carry, size=length)
  return jnp.moveaxis(_apply(weights, tokens[0]), -2, 1).astype(v.dtype)


def _check(q, k, v, learning_rate, weights, momentum):
  shapes.check_qkv(q, k, v)
  batch, length, heads, channels = k.shape
  values = v.shape[-1]
  if v.shape[2] != heads:
    raise ValueError(
      f'v has {v.shape[2]} heads, k has {heads}: repeat the heads of k.'
    )
  hidden = weights[0].shape[-1]
  shapes.check_shapes(
    {
      'learning_rate': (learning_rate, (batch, length, heads, 3)),
      'momentum': (momentum, (batch, length, heads)),
      'weights[0]': (weights[0], (heads, channels, hidden)),
      'weights[1]': (weights[1], (heads, hidden, values)),
      'weights[2]': (weights[2], (heads, channels, hidden)),
    }
  )


def _check_state(state, fresh):
  """Refuses the state of another model or batch."""
  given, wanted = (
    jax.tree.map(lambda x: x.shape, tuple(s)) for s in (state, fresh)
  )
  if given != wanted:
    raise ValueError(
      f'initial_state has the shapes {given}: pass a LactState of {wanted}, '
      'as an earlier call with the same weights and momentum returned it.'
    )
