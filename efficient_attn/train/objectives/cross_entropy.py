"""Losses of logits: cross-entropy, and the divergence from a teacher."""

import jax
import jax.numpy as jnp


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  label_smoothing: float = 0.0,
  z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Returns the training objective and the plain cross-entropy, in nats.

    nll = log Z - logits[label],    log Z = logsumexp(logits)
    objective = (1 - e) nll + e mean_c (log Z - logits[c]) + z (log Z)^2

  Args:
    logits: [..., classes].
    labels: int [...].
    label_smoothing: e above.
    z_loss: z above (Chowdhery et al. 2204.02311).

  Returns:
    Two float32 arrays [...].
  """
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  log_z = jax.nn.logsumexp(logits, axis=-1)
  if 1 in labels.shape:  # an axis of one has no sharding that a gather takes
    chosen = jnp.arange(logits.shape[-1]) == labels[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
  else:
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  nll = log_z - picked
  objective = nll
  if label_smoothing:
    uniform = log_z - jnp.mean(logits, axis=-1)
    objective = (1 - label_smoothing) * nll + label_smoothing * uniform
  if z_loss:
    objective = objective + z_loss * log_z**2
  return objective, nll


def divergence(
  logits: jax.Array, teacher_logits: jax.Array, temperature: float = 1.0
) -> jax.Array:
  """Returns the divergence of a student from its teacher, in nats.

    KL(p || q) T^2,    p = softmax(teacher / T),    q = softmax(logits / T)

  The factor keeps the size of the gradient as T grows (Hinton et al.
  1503.02531). Where one vocabulary is padded to more tokens than the other,
  the tokens that both have count.

  Args:
    logits: [..., classes].
    teacher_logits: [..., classes], of no gradient.
    temperature: T above.

  Returns:
    float32 [...], summed over the classes.
  """
  shared = min(logits.shape[-1], teacher_logits.shape[-1])
  student, teacher = (
    x[..., :shared].astype(jnp.promote_types(x.dtype, jnp.float32))
    for x in (logits, jax.lax.stop_gradient(teacher_logits))
  )
  log_q = jax.nn.log_softmax(student / temperature)
  log_p = jax.nn.log_softmax(teacher / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
