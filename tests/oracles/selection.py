"""The rules of training-free selectors, in float64 numpy and plain loops.

Arrays are of one sequence: query [T, N, H], key [S, K, H]; queries are the last
T of S positions. Each returns which keys are read, [N, T, S].
"""

import numpy as np


def ranked(scores):
  return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def best(scores, count):
  return [j for j in ranked(scores)[:count] if scores[j] > -np.inf]


def cover(weights, share):
  chosen, total = [], 0.0
  for j in ranked(weights):
    if share < 1 and total >= share * sum(weights):
      break
    chosen.append(j)
    total += weights[j]
  return chosen


def softmax(scores):
  scores = np.asarray(scores, float)
  weights = np.exp(scores - scores.max()) if len(scores) else scores
  return weights / weights.sum()


def logits(query, key):
  G = query.shape[1] // key.shape[1]
  H = query.shape[2]
  return np.stack(
    [query[:, n] @ key[:, n // G].T / np.sqrt(H) for n in range(query.shape[1])]
  )


def causal_map(query, key):
  scores = logits(query, key)
  p = np.zeros_like(scores)
  for n, t in np.ndindex(*scores.shape[:2]):
    end = key.shape[0] - query.shape[0] + t + 1
    p[n, t, :end] = softmax(scores[n, t, :end])
  return p


def means(x, size):
  return np.stack([x[i : i + size].mean(0) for i in range(0, len(x), size)])


def read(query, key, rule):
  """Keys that the rule (n, position, s) admits among those not ahead."""
  (T, N), S = query.shape[:2], len(key)
  found = np.zeros((N, T, S), bool)
  for n, t, s in np.ndindex(N, T, S):
    position = S - T + t
    found[n, t, s] = s <= position and rule(n, position, s)
  return found


def per_row(scores, choose, limit):
  """chosen[n][i] among the first limit(i) columns of scores [N, I, J]."""
  return [
    [
      choose(np.where(np.arange(len(row)) < limit(i), row, -np.inf), i)
      for i, row in enumerate(rows)
    ]
    for rows in scores
  ]


def streaming_llm(query, key, sinks, window):
  return read(query, key, lambda n, p, s: s < sinks or s > p - window)


def sample_attention(query, key, sample, window, coverage):
  T, S = len(query), len(key)
  rows = range(T - 1, -1, -int(1 / sample))
  total = causal_map(query, key)[:, list(rows)].sum(1)
  columns = [cover(weights, coverage) for weights in total]
  width = int(np.ceil(window * S))
  return read(query, key, lambda n, p, s: s > p - width or s in columns[n])


def sparge(query, key, block_q, block_k, coverage, similarity, skip_below=None):
  N, G = query.shape[1], query.shape[1] // key.shape[1]

  def alike(x, size, head):
    found = []
    for i in range(0, len(x), size):
      unit = [v / np.linalg.norm(v) for v in x[i : i + size, head]]
      found.append(np.mean([a @ b for a in unit for b in unit]) >= similarity)
    return found

  scores = logits(means(query, block_q), means(key, block_k))
  full = logits(query, key)
  kept = set()
  for n in range(N):
    sure_q, sure_k = alike(query, block_q, n), alike(key, block_k, n // G)
    for i, row in enumerate(scores[n]):
      seen = [j for j in range(len(row)) if j * block_k < (i + 1) * block_q]
      judged = [j for j in seen if sure_k[j]]
      chosen = []
      if judged:
        chosen = [judged[c] for c in cover(softmax(row[judged]), coverage)]
      top = np.full(block_q, -np.inf)
      for j in seen:
        own = (j + 1) * block_k > i * block_q
        if j not in chosen and sure_q[i] and sure_k[j] and not own:
          continue
        worth = -np.inf
        for r in range(block_q):
          t = i * block_q + r
          tile = [
            full[n, t, s]
            for s in range(j * block_k, (j + 1) * block_k)
            if s <= t
          ]
          if tile:
            top[r] = max(top[r], max(tile))
            worth = max(worth, max(tile) - top[r])
        if skip_below is None or worth >= skip_below:
          kept.add((n, i, j))
  return read(
    query, key, lambda n, p, s: (n, p // block_q, s // block_k) in kept
  )


def lines(query, key, last):
  """What the last queries give to each column and to each distance."""
  S = len(key)
  p = causal_map(query, key)[:, -last:]
  first = S - p.shape[1]
  columns, slashes = p.sum(1), np.zeros((len(p), S))
  for n, r, s in np.ndindex(*p.shape):
    if s <= first + r:
      slashes[n, first + r - s] += p[n, r, s]
  return columns, slashes


def vertical_slash(query, key, last, num_vertical, num_slash):
  columns, slashes = lines(query, key, last)
  slashes[:, 0] = np.inf
  vertical = [best(row, num_vertical) for row in columns]
  slash = [best(row, num_slash) for row in slashes]
  return read(query, key, lambda n, p, s: s in vertical[n] or p - s in slash[n])


def block_sparse(query, key, block_size, top_k):
  scores = logits(means(query, block_size), means(key, block_size))

  def choose(row, i):
    row[i] = np.inf
    return best(row, top_k)

  kept = per_row(scores, choose, lambda i: i + 1)
  return read(
    query,
    key,
    lambda n, p, s: s // block_size in kept[n][p // block_size],
  )


def minference(query, key, **options):
  p = causal_map(query, key)
  names = ('streaming_llm', 'vertical_slash', 'block_sparse')
  masks = [globals()[name](query, key, **options[name]) for name in names]
  choice = [
    np.argmax([(p[n] * mask[n]).sum() for mask in masks]) for n in range(len(p))
  ]
  return np.stack([masks[c][n] for n, c in enumerate(choice)])


def flex_prefill(query, key, block_size, coverage, divergence=0.1):
  N, blocks = query.shape[1], len(key) // block_size
  p = causal_map(query, key)[:, -block_size:]
  pooled = causal_map(means(query, block_size), means(key, block_size))
  columns, slashes = lines(query, key, block_size)
  kept = []
  for n in range(N):
    true = [
      p[n, :, j * block_size : (j + 1) * block_size].sum() / block_size
      for j in range(blocks)
    ]
    guess = pooled[n, -1]
    middle = (true + guess) / 2
    jsd = (true * np.log(true / middle) + guess * np.log(guess / middle)) / 2
    if np.sqrt(jsd.sum()) < divergence:
      kept.append(('blocks', set(cover(pooled[n].reshape(-1), coverage))))
    else:
      kept.append(
        ('lines', (cover(columns[n], coverage), cover(slashes[n], coverage)))
      )

  def rule(n, p, s):
    kind, chosen = kept[n]
    if kind == 'blocks':
      i, j = p // block_size, s // block_size
      return i == j or i * blocks + j in chosen
    return s in chosen[0] or p - s in chosen[1] or p == s

  return read(query, key, rule), [kind for kind, _ in kept]


def antidiagonal_sums(query, key, stride):
  full = logits(query, key)
  sums = np.zeros((len(full), len(query) // stride, len(key) // stride))
  for n, t, s in np.ndindex(*full.shape):
    if t % stride + s % stride == stride - 1:
      sums[n, t // stride, s // stride] += full[n, t, s]
  return sums


def xattention(query, key, block_size, stride, coverage):
  sums = antidiagonal_sums(query, key, stride) / stride
  inner = block_size // stride
  blocks = len(key) // block_size
  kept = set()
  for n, i in np.ndindex(len(sums), blocks):
    mass = np.zeros(blocks)
    for r in range(i * inner, (i + 1) * inner):
      for j, weight in enumerate(softmax(sums[n, r, : r + 1])):
        mass[j // inner] += weight
    kept |= {(n, i, j) for j in [*cover(mass, coverage), i]}
  return read(
    query, key, lambda n, p, s: (n, p // block_size, s // block_size) in kept
  )


def page_bounds(query, key, page_size):
  G = query.shape[1] // key.shape[1]
  bounds = np.zeros((query.shape[1], len(query), len(key) // page_size))
  for n, t, i in np.ndindex(*bounds.shape):
    page = key[i * page_size : (i + 1) * page_size, n // G]
    low, high = page.min(0), page.max(0)
    bounds[n, t, i] = sum(
      max(q * a, q * b) for q, a, b in zip(query[t, n], low, high, strict=True)
    )
  return bounds


def quest(query, key, page_size, top_k):
  T, S = len(query), len(key)
  whole = S // page_size * page_size
  bounds = page_bounds(query, key[:whole], page_size)
  kept = {}
  for n, t in np.ndindex(*bounds.shape[:2]):
    own = (S - T + t) // page_size
    kept[n, S - T + t] = [own, *best(bounds[n, t, :own], top_k - 1)]
  return read(query, key, lambda n, p, s: s // page_size in kept[n, p])


def top_tokens(query, key, scores, top_k):
  T, S = len(query), len(key)
  kept = {}
  for n, t in np.ndindex(*scores.shape[:2]):
    kept[n, S - T + t] = best(scores[n, t, : S - T + t + 1], top_k)
  return read(query, key, lambda n, p, s: s in kept[n, p])


def sparq_map(query, key, rank):
  T, N, H = query.shape
  G = N // key.shape[1]
  S = len(key)
  p = np.zeros((N, T, S))
  for n, t in np.ndindex(N, T):
    q = query[t, n]
    channels = best(np.abs(q), rank)
    heat = np.sqrt(H * np.abs(q[channels]).sum() / np.abs(q).sum())
    end = S - T + t + 1
    p[n, t, :end] = softmax(key[:end, n // G][:, channels] @ q[channels] / heat)
  return p


def sparq(query, key, rank, top_k, local):
  scores = sparq_map(query, key, rank)
  for n, t, s in np.ndindex(*scores.shape):
    if s > len(key) - len(query) + t - local:
      scores[n, t, s] = np.inf
  return top_tokens(query, key, scores, top_k)


def loki(query, key, rank, top_k):
  G = query.shape[1] // key.shape[1]
  scores = []
  for n in range(query.shape[1]):
    k = key[:, n // G]
    # Right singular vectors of the centred keys are their principal axes.
    axes = np.linalg.svd(k - k.mean(0))[2][:rank]
    scores.append((query[:, n] @ axes.T) @ (k @ axes.T).T)
  return top_tokens(query, key, np.stack(scores), top_k)


def magicpig(query, key, planes, sinks, window):
  """Also the probability with which each key is read."""
  bits, tables = planes.shape[:2]
  G = query.shape[1] // key.shape[1]
  hits = np.zeros((query.shape[1], len(query), len(key)), int)
  u = np.zeros(hits.shape)
  for n, t, s in np.ndindex(*hits.shape):
    q, k = query[t, n], key[s, n // G]
    for table in range(tables):
      hits[n, t, s] += all(
        (planes[c, table] @ q > 0) == (planes[c, table] @ k > 0)
        for c in range(bits)
      )
    cosine = q @ k / np.linalg.norm(q) / np.linalg.norm(k)
    p = (1 - np.arccos(cosine) / np.pi) ** bits
    u[n, t, s] = 1 - (1 - p) ** tables - tables * p * (1 - p) ** (tables - 1)
  near = streaming_llm(query, key, sinks, window)
  drawn = read(query, key, lambda n, p, s: True)
  drawn &= hits >= 2
  return near | drawn, np.where(near, 1, u)


def infllm(query, key, block_size, representatives, sinks, window, top_k):
  S, N = query.shape[:2]
  G = N // key.shape[1]
  H = query.shape[2]
  blocks = S // block_size
  kept = {}
  for n in range(N):
    k = key[:, n // G]
    centres, ready = [], []
    for i in range(blocks):
      block = range(i * block_size, (i + 1) * block_size)
      ready.append(block[-1] + window)
      score = [
        sum(query[l, n] @ k[j] for l in range(j + 1, min(j + window + 1, S)))
        for j in block
      ]
      chosen = best(score, representatives)
      centres.append(np.mean([k[block[c]] for c in chosen], axis=0))
    for p in range(S):
      score = [
        query[p, n] @ c / np.sqrt(H) if ready[i] <= p else -np.inf
        for i, c in enumerate(centres)
      ]
      pending = [i for i in range(blocks) if ready[i] > p]
      kept[n, p] = best(score, top_k) + pending
  return read(
    query,
    key,
    lambda n, p, s: (
      s < sinks or s > p - window or s // block_size in kept[n, p]
    ),
  )


def retrieval(query, key, sinks, window, top_k):
  near = streaming_llm(query, key, sinks, window)
  scores = np.where(near, -np.inf, logits(query, key))
  return near | top_tokens(query, key, scores, top_k)


def kmeans(points, clusters, iterations=10):
  centres = [points[0]]
  while len(centres) < clusters:
    gap = [min(((x - c) ** 2).sum() for c in centres) for x in points]
    centres.append(points[best(gap, 1)[0]])

  def assign():
    return np.array(
      [best([-((x - c) ** 2).sum() for c in centres], 1)[0] for x in points]
    )

  for _ in range(iterations):
    ids = assign()
    centres = [
      points[ids == c].mean(0) if (ids == c).any() else centre
      for c, centre in enumerate(centres)
    ]
  return assign(), np.stack(centres)


def chai(query, key, num_clusters, probe=5):
  maps = causal_map(query[:probe], key[:probe]).reshape(query.shape[1], -1)
  ids, centres = kmeans(maps, num_clusters)
  found = []
  for n in range(len(maps)):
    member = [m for m in range(len(maps)) if ids[m] == ids[n]]
    gap = [((maps[m] - centres[ids[n]]) ** 2).sum() for m in member]
    found.append(member[int(np.argmin(gap))])
  return found
