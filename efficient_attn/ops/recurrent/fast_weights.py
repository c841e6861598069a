"""Fast weights: a model per head, trained on the tokens as they come.

Token t shows the model f the pair (k_t, v_t), and is answered with f(q_t):

  M_t = m_t M_{t-1} - eta_t g_t        m_t = exp(log_momentum_t)
  W_t = d_t W_{t-1} + M_t              d_t = exp(log_decay_t)
  o_t = f(q_t; W_t)

  no gates        TTT-Linear and TTT-MLP (2407.04620): W_t = W_{t-1} - eta_t g_t
  both            Titans (2501.00663), neural memory

f is x -> x W + b, or such layers with an activation between them; with `norm`
it is x -> x + LN(layers(x)). The gradient g_t is of |f(k_t) - v_t|^2 / 2, and
taken at the weights before the mini-batch of token t, `chunk_size` tokens
counted from the first of the segment. With the inputs x and the output
gradients e of a layer at these weights, a mini-batch of C tokens is

  y W_t = keep_t (y W) + lift_t (y M) - sum_{s <= t} A_ts (y . x_s) e_s,

matrix products with A [C, C] from the scalar gates (the paper's dual form):
O(T (C (H + F) + H F)) time per head for layers of H x F, state O(H F).

With `shares` a, token i of a mini-batch that began at W reads the weights
W + a_i (W_t - W), and the next mini-batch begins at those of the last token.
The shares of TTT are 1 / (i + 1): of the gradients so far, not their sum but
their mean.
"""

import functools
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_attn.ops import shapes
from efficient_attn.ops.products import product
from efficient_attn.ops.recurrent import forms, gates, mini_batches

# Weight [N, inputs, outputs] and bias [N, outputs] of each layer; in a state
# with an axis [B] before.
Layers: TypeAlias = tuple[tuple[Array, Array | None], ...]
ACTIVATIONS = {
  'gelu': functools.partial(jax.nn.gelu, approximate=True),
  'silu': jax.nn.silu,
}


class FastState(NamedTuple):
  """What a mini-batch under way needs.

  Attributes:
    base: the weights at which gradients are taken.
    weights: W_t, the weights now, before any shares.
    momentum: M, None without momentum.
    count: [B], tokens seen since `base`, 0 to chunk_size.
  """

  base: Layers
  weights: Layers
  momentum: Layers | None
  count: Int[Array, 'B']


def fast_weights(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T N H'],
  v: Float[Array, 'B T N V'],
  learning_rate: Float[Array, 'B T N'],
  *,
  weights: Layers,
  norm: tuple[Float[Array, 'N V'], Float[Array, 'N V']] | None = None,
  shares: Float[Array, 'C'] | None = None,
  log_decay: Float[Array, 'B T N'] | None = None,
  log_momentum: Float[Array, 'B T N'] | None = None,
  activation: str = 'gelu',
  initial_state: FastState | None = None,
  segment_ids: Int[Array, 'B T'] | None = None,
  bidirectional: bool = False,
  form: str | None = None,
  chunk_size: int = 16,
  implementation: str | None = None,
) -> tuple[Float[Array, 'B T N V'], FastState | None]:
  """Trains `weights` on (k, v) token by token, o_t = f(q_t; W_t).

  Args:
    q: what the model is asked.
    k: what it is shown, used as given: with |k| large against
      1 / learning_rate the weights diverge.
    v: what it should answer.
    learning_rate: eta.
    weights: the model at the start of every segment: for each layer its
      weight [N, inputs, outputs], and its bias [N, outputs] or None.
    norm: scale and bias of a layer norm (epsilon 1e-6) over the output of the
      last layer, whose result is added to the input; needs V = H.
    shares: [chunk_size], how much of what its mini-batch has changed so far
      each token reads, without gates; None: all.
    log_decay: <= 0, of the weights; None keeps all. -inf forgets all.
    log_momentum: <= 0, of the past updates; None: M_t = -eta_t g_t.
    activation: between layers, 'gelu' (tanh form) or 'silu'.
    initial_state: continues the sequence of an earlier call.
    segment_ids: the model is that of `weights` again at every token whose id
      differs from the id of the token before it.
    bidirectional: the sum of the op on the sequence and on the reversed
      sequence, whose mini-batches count from the end.
    form: 'chunkwise' (matrix products), 'recurrent' (token by token) or None:
      the second for a single token.
    chunk_size: tokens per inner mini-batch, a power of two. Unlike in the
      linear family it is a part of the definition.
    implementation: None or 'xla'.

  Returns:
    out: [B, T, N, V] in the dtype of v.
    state: after the last token, float32 (float64 for float64 inputs); None
      when `bidirectional`.
  """
  mini_batches.check(form, implementation, 'fast_weights')
  _check(q, k, v, learning_rate, weights, norm, shares, log_decay, log_momentum)
  shapes.check_shapes(
    {
      'segment_ids': (segment_ids, q.shape[:2]),
      'shares': (shares, (chunk_size,)),
    }
  )
  if activation not in ACTIVATIONS:
    raise ValueError(
      f'activation = {activation!r}: pass one of {tuple(ACTIVATIONS)}.'
    )
  shapes.check_directions(bidirectional, initial_state)
  batch = q.shape[0]
  dtype = shapes.accumulator(q, k, v, learning_rate, weights, norm)
  fresh = _cast(
    fresh_state(weights, batch, momentum=log_momentum is not None), dtype
  )
  state = None
  if initial_state is not None:
    _check_state(initial_state, fresh)
    state = _cast(initial_state, dtype)
    state = state[:3], state.count

  floor = gates.log_decay_floor(dtype)

  def scalar(x):
    return None if x is None else x.astype(dtype)[..., None]

  def log_gate(x):
    return None if x is None else jnp.maximum(scalar(x), floor)

  tokens = (
    q,
    k,
    v,
    scalar(learning_rate),
    log_gate(log_decay),
    log_gate(log_momentum),
  )
  if norm is not None:  # against tokens [B, N, C, V]
    norm = tuple(x.astype(dtype)[:, None] for x in norm)
  if shares is not None:
    shares = shares.astype(dtype)

  def run(tokens, state, segment_ids):
    share = None
    if shares is not None:
      places = mini_batches.places(
        q.shape[1], state and state[1], segment_ids, chunk_size
      )
      share = shares[places][:, :, None, None]
    return mini_batches.recur(
      functools.partial(_begin, share=None if shares is None else shares[-1]),
      functools.partial(_learn, norm=norm, activation=ACTIVATIONS[activation]),
      (*tokens, share),
      fresh[:3],
      state,
      segment_ids=segment_ids,
      form=form,
      chunk_size=chunk_size,
    )

  out, state = run(tokens, state, segment_ids)
  if bidirectional:
    tokens, segment_ids = forms.reversed_tokens((tokens, segment_ids))
    backward, _ = run(tokens, None, segment_ids)
    return (out + jnp.flip(backward, 1)).astype(v.dtype), None
  return out.astype(v.dtype), FastState(*state[0], state[1])


def fresh_state(
  weights: Layers, batch: int, *, momentum: bool = False
) -> FastState:
  """Returns the state before the first token."""
  layers = jax.tree.map(
    lambda w: jnp.broadcast_to(w, (batch, *w.shape)), weights
  )
  moving = jax.tree.map(jnp.zeros_like, layers) if momentum else None
  return FastState(layers, layers, moving, jnp.zeros(batch, jnp.int32))


def _begin(carry, *, share):
  base, weights, momentum = carry
  if share is not None:
    weights = jax.tree.map(lambda b, w: b + share * (w - b), base, weights)
  return weights, weights, momentum


def _learn(carry, tokens, seen, *, norm, activation):
  """Tokens [B, N, C, X] of one mini-batch; see `mini_batches.recur`."""
  base, weights, momentum = carry
  q, k, v, rate, log_decay, log_momentum, share = tokens
  dtype = rate.dtype
  operand = shapes.operand(dtype, q, k, v)

  dot = functools.partial(product, operand=operand, dtype=dtype)

  def layer(x, weight, bias):
    z = dot('bnch,bnhf->bncf', x, weight)
    return z if bias is None else z + bias[:, :, None]

  def finish(x, z):
    return z if norm is None else x + _layer_norm(z, *norm)

  q, k, v = (x.astype(dtype) for x in (q, k, v))
  inputs, errors = _backpropagate(base, k, v, layer, finish, activation, dot)
  mix = _mix(rate, log_decay, log_momentum, seen[:, None])

  # Each layer as it is when token t is read, and after the last token.
  y, after, moving = q, [], []
  for i, (x, error) in enumerate(zip(inputs, errors, strict=True)):
    now = weights[i]
    affine = now[1] is not None
    z = mix.keep * layer(y, *now)
    if momentum is not None:
      z = z + mix.lift * layer(y, *momentum[i])
    scores = dot('bnth,bnsh->bnts', y, x) + float(affine)
    change = dot('bnts,bnsf->bntf', mix.write * scores, error)
    if share is not None:
      change = share * change
      if weights is not base:  # not the first tokens of the mini-batch
        z = share * z + (1 - share) * layer(y, *base[i])
    z = z - change

    def gradient(per_token, x=x, error=error, affine=affine):
      error = error * per_token[..., None]
      weight = dot('bnsh,bnsf->bnhf', x, error)
      return weight, jnp.sum(error, 2) if affine else None

    kept = _scale(mix.keep[:, :, -1], now)
    if momentum is not None:
      lifted = _scale(mix.lift[:, :, -1], momentum[i])
      kept = jax.tree.map(jnp.add, kept, lifted)
      held = _scale(mix.hold, momentum[i])
      moving.append(jax.tree.map(jnp.subtract, held, gradient(mix.push)))
    written = gradient(mix.write[:, :, -1])
    after.append(jax.tree.map(jnp.subtract, kept, written))
    y = z if i == len(weights) - 1 else activation(z)
  momentum = None if momentum is None else tuple(moving)
  return (base, tuple(after), momentum), finish(q, y)


def _backpropagate(base, k, v, layer, finish, activation, dot):
  """The input and the gradient of the output of each layer, per token."""
  x, inputs, pulls = k, [], []
  for i, weights in enumerate(base):
    inputs.append(x)
    x = layer(x, *weights)
    if i < len(base) - 1:
      x, pull = jax.vjp(activation, x)
      pulls.append(pull)
  answer, pull = jax.vjp(functools.partial(finish, k), x)
  errors = [pull(answer - v)[0]]
  for (weight, _), pull in zip(base[:0:-1], pulls[::-1], strict=True):
    errors.append(pull(dot('bncf,bnhf->bnch', errors[-1], weight))[0])
  return inputs, errors[::-1]


class _Mix(NamedTuple):
  """What a mini-batch leaves of W and M, and how much it writes.

  Attributes:
    keep: [B, N, C, 1], of the weights before it, when token t is read.
    lift: the same of the momentum before it.
    write: [B, N, C, C], the gradient of token s in the weights of token t.
    hold: [B, N, 1], of the momentum before it in the momentum after it.
    push: [B, N, C], the gradients in the momentum after it.
  """

  keep: Array
  lift: Array | None
  write: Array
  hold: Array | None
  push: Array | None


def _mix(rate, log_decay, log_momentum, seen):
  """Products of the gates; the ones of masked tokens do not count."""
  dtype = rate.dtype
  learned = jnp.diagonal(seen, axis1=-2, axis2=-1)[..., None]
  rate = jnp.where(learned, rate, 0)[..., 0]

  def dot(spec, *xs):
    return jnp.einsum(spec, *xs, precision=jax.lax.Precision.HIGHEST)

  def products(gate):
    """Over (s, t] for all pairs, and up to each token."""
    gate = jnp.where(learned, gate, 0)[..., 0]
    spans, _, _ = gates.span_sums(gate)
    before = dot('bnts,bns->bnt', seen.astype(dtype), gate)
    return jnp.where(seen, jnp.exp(spans), 0), jnp.exp(before)

  if log_decay is None:
    decay = jnp.where(seen, jnp.ones((), dtype), 0)
    keep = jnp.ones((1, 1, decay.shape[-1], 1), dtype)
  else:
    decay, keep = products(log_decay)
    keep = keep[..., None]
  if log_momentum is None:
    return _Mix(keep, None, decay * rate[:, :, None], None, None)
  held, before = products(log_momentum)
  decay = jnp.broadcast_to(decay, held.shape)
  return _Mix(
    keep=keep,
    lift=dot('bntr,bnr->bnt', decay, before)[..., None],
    write=dot('bntr,bnrs->bnts', decay, held) * rate[:, :, None],
    hold=before[:, :, -1:],
    push=held[:, :, -1] * rate,
  )


def _layer_norm(z, scale, bias):
  z = z - jnp.mean(z, -1, keepdims=True)
  variance = jnp.mean(z * z, -1, keepdims=True)
  return z * jax.lax.rsqrt(variance + 1e-6) * scale + bias


def _scale(factor, layer):
  """A factor [B, N, 1] times the weight and the bias of a layer."""
  weight, bias = layer
  weight = factor[..., None] * weight
  return weight, None if bias is None else factor * bias


def _cast(state, dtype):
  layers = jax.tree.map(lambda x: x.astype(dtype), state[:3])
  return FastState(*layers, state.count)


def _check(
  q, k, v, learning_rate, weights, norm, shares, log_decay, log_momentum
):
  shapes.check_qkv(q, k, v)
  batch, length, heads, channels = k.shape
  values = v.shape[-1]
  if v.shape[2] != heads:
    raise ValueError(
      f'v has {v.shape[2]} heads, k has {heads}: repeat the heads of k.'
    )
  wanted = {
    'learning_rate': (learning_rate, (batch, length, heads)),
    'log_decay': (log_decay, (batch, length, heads)),
    'log_momentum': (log_momentum, (batch, length, heads)),
  }
  if not weights:
    raise ValueError('weights is empty: pass a (weight, bias) for each layer.')
  width = channels
  for i, (weight, bias) in enumerate(weights):
    last = i == len(weights) - 1
    outputs = values if last else weight.shape[-1]
    wanted[f'weights[{i}][0]'] = (weight, (heads, width, outputs))
    wanted[f'weights[{i}][1]'] = (bias, (heads, outputs))
    width = outputs
  if norm is not None:
    if values != channels:
      raise ValueError(
        f'v has {values} channels and k {channels}: with norm the input is '
        'added to the output, pass equal ones.'
      )
    wanted['norm[0]'] = (norm[0], (heads, values))
    wanted['norm[1]'] = (norm[1], (heads, values))
  shapes.check_shapes(wanted)
  for gate in (log_decay, log_momentum):
    if gate is not None:
      shapes.check_log_decay(gate)
      if shares is not None:
        raise ValueError(
          'shares have no meaning with gates: pass log_decay and log_momentum'
          ' without them.'
        )


def _check_state(state, fresh):
  """Refuses the state of another model or batch."""
  given, wanted = (
    jax.tree.map(lambda x: x.shape, tuple(s)) for s in (state, fresh)
  )
  if given != wanted:
    raise ValueError(
      f'initial_state has the shapes {given}: pass a FastState of {wanted}, '
      'as an earlier call with the same weights and gates returned it.'
    )
