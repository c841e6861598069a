"""A mixture of experts token by token and expert by expert, in numpy."""

import numpy as np


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def choose(logits, top_k, routing, correction=0.0):
  """Returns [(expert, weight), ...] of one token with `logits` [E]."""
  scores = {'softmax': softmax, 'sigmoid': sigmoid}[routing.scores](logits)
  ranks = scores + correction
  groups = np.split(np.arange(len(logits)), routing.groups)
  value = [np.sort(ranks[g])[-routing.group_best :].sum() for g in groups]
  best = sorted(range(len(groups)), key=lambda g: (-value[g], g))
  allowed = [e for g in best[: routing.top_groups] for e in groups[g]]
  chosen = sorted(allowed, key=lambda e: (-ranks[e], e))[:top_k]
  total = sum(scores[e] for e in chosen) if routing.normalize else 1
  return [(e, routing.scale * scores[e] / total) for e in chosen]


def mixture(x, chosen, expert):
  """Sums expert(e, token) by weight, for tokens x [M, D]."""
  return np.stack([
    sum(weight * expert(e, token) for e, weight in pairs)
    for token, pairs in zip(x, chosen, strict=True)
  ])  # fmt: skip
