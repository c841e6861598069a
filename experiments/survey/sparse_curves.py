"""Selectors of keys: what they keep of the attention for what they compute."""

import functools
from statistics import fmean

import jax
import jax.numpy as jnp
import numpy as np

from efficient_attn.ops import attention, masks
from efficient_attn.ops.selection import SELECTORS
from experiments import page
from experiments.errors import relative
from experiments.survey.seeds import SEEDS, spread

S, H = 1024, 32
GRID = (4, 16, 16)
SHARES = (0.1, 0.25, 0.5, 1.0)
CURVE_SEEDS = SEEDS[:2]
CHANCE = 'random keys'
ROWS = {n: row for n, row in SELECTORS.items() if row.returns != 'heads'}
# What choices depend on, by `Selector.sees`: one plot each.
GROUPS = {
  'choose for each query': ('token',),
  'choose for blocks or for a prompt': ('block', 'prompt'),
  'choose in a video': ('grid',),
}


def waves(place, pairs: int, base: float) -> np.ndarray:
  """Features whose product falls with the distance of two places."""
  angle = place[:, None] * base ** (-np.arange(pairs) / pairs)
  return np.concatenate([np.cos(angle), np.sin(angle)], -1)


def text(seed: int) -> list:
  """Heads that look near by, each to another degree, sinks, heavy hitters."""
  rng = np.random.default_rng(seed)
  q, k = (rng.standard_normal((1, S, n, H)) for n in (4, 2))
  near = waves(np.arange(S), 3, 10)
  popular = np.zeros(S)
  popular[rng.permutation(S)[: S // 64]] = 3.5
  popular[:2] = 4
  strength = np.array([2.5, 1, 0.3, 2])
  q[0, :, :, :6] = near[:, None] * strength[:, None]
  q[..., 6] = 3
  k[0, :, :, :6] = 2 * near[:, None]
  k[0, :, :, 6] = popular[:, None]
  v = rng.standard_normal((1, S, 2, H))
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


def video(seed: int) -> list:
  """Heads that look along time, along space, along both, along one axis."""
  rng = np.random.default_rng(seed)
  q, k = (rng.standard_normal((1, S, n, H)) for n in (4, 2))
  strength = np.array(
    [[3, 0.3, 0.3], [0.2, 2, 2], [1.5, 1.5, 1.5], [0.2, 3, 0.2]]
  )
  cells = np.unravel_index(np.arange(S), GRID)
  for axis, cell in enumerate(cells):
    here, along = slice(4 * axis, 4 * axis + 4), waves(cell, 2, 6)
    q[0, :, :, here] = along[:, None] * strength[:, axis, None]
    k[0, :, :, here] = 2 * along[:, None]
  v = rng.standard_normal((1, S, 2, H))
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v)]


@jax.jit
def _attend(q, k, v, mask, bias):
  return attention(
    q,
    k,
    v,
    mask=masks.Dense(mask),
    bias=bias,
    implementation='reference',
    return_lse=True,
  )


@functools.lru_cache(2)
def _problem(grid: bool, seed: int):
  """Arrays, the pairs of attention to all keys, its output and log sums."""
  arrays = video(seed) if grid else text(seed)
  base = masks.Window(None, None) if grid else masks.Causal()
  pairs = base.dense(S, S)
  return arrays, pairs, _attend(*arrays, pairs, None)


def kept(mask, bias, grid: bool, seed: int) -> list[float]:
  """Keys, mass and error of the output of attention to a part of the keys."""
  (q, k, v), pairs, (exact, everything) = _problem(grid, seed)
  out, some = _attend(q, k, v, mask, bias)
  if bias is not None:  # which counts for the output, not for the mass
    some = _attend(q, k, v, mask, None)[1]
  heads = q.shape[2] / mask.shape[1]
  return [
    float(heads * mask.sum() / (q.shape[2] * pairs.sum())),
    float(jnp.exp(some - everything).mean()),
    relative(out, exact),
  ]


def curve(name: str, seed: int) -> list[list[float]]:
  """Keys, mass and error of one selector, for each of SHARES."""
  row = ROWS[name]
  grid = row.sees == 'grid'
  (q, k, v), *_ = _problem(grid, seed)
  found = []
  for share in SHARES:
    arrays = (q, k, v) if row.needs_value else (q, k)
    mask = row.select(*arrays, **row.options(share, GRID if grid else S))
    mask, bias = mask if row.returns == 'mask and bias' else (mask, None)
    found.append(kept(mask.dense(S, S), bias, grid, seed))
  return found


def by_chance(grid: bool, seed: int) -> list[list[float]]:
  """The same of keys drawn at random, the query's own among them."""
  pairs = _problem(grid, seed)[1]
  draws = jax.random.uniform(jax.random.key(seed), (1, 4, S, S))
  own = jnp.eye(S, dtype=bool)
  return [
    kept(pairs & ((draws < share) | own), None, grid, seed) for share in SHARES
  ]


def curves() -> dict[str, list]:
  """The curves of every selector, and of chance, for each seed."""
  found = {name: [curve(name, seed) for seed in CURVE_SEEDS] for name in ROWS}
  for grid, name in ((False, CHANCE), (True, f'{CHANCE}, video')):
    found[name] = [by_chance(grid, seed) for seed in CURVE_SEEDS]
  return found


def at(values, name: str, share: float, what: int) -> list[float]:
  """One figure of a curve for each seed: keys 0, mass 1 or error 2."""
  curves = values['curves'][name]
  return [points[SHARES.index(share)][what] for points in curves]


def beyond(values, name: str) -> float:
  """Mass at a budget of 0.25 less that of StreamingLLM with as many keys."""
  fixed = [
    [fmean(at(values, 'streaming_llm', s, i)) for s in SHARES] for i in (0, 1)
  ]
  keys, mass = (fmean(at(values, name, 0.25, i)) for i in (0, 1))
  return mass - float(np.interp(keys, [0, *fixed[0]], [0, *fixed[1]]))


def dynamic() -> list[str]:
  """The causal selectors that look at queries and keys."""
  names = [name for name, row in ROWS.items() if row.sees != 'grid']
  return [name for name in names if name != 'streaming_llm']


def better(values) -> list[str]:
  """Those that keep more than a fixed pattern of as many keys."""
  return [name for name in dynamic() if beyond(values, name) > 0.01]


def parts(values) -> list:
  """Plots of mass against keys, and a table with the errors."""
  plots = []
  for title, sees in GROUPS.items():
    (made, axes), entries = page.figure(), {}
    names = [n for n, row in ROWS.items() if row.sees in sees]
    for i, name in enumerate([*names, CHANCE]):
      keys, mass = (
        [fmean(at(values, name, s, j)) for s in SHARES] for j in (0, 1)
      )
      chance = name == CHANCE
      style = page.style(i) | (
        dict(color=page.INK, linestyle=':') if chance else {}
      )
      (entries[name if chance else ROWS[name].title],) = axes.plot(
        keys, mass, **style
      )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel('keys computed, a share')
    axes.set_ylabel('softmax mass kept')
    page.legend(axes, entries)
    caption = f'Selectors that {title}: {S} tokens with structure, 4 heads'
    plots.append(page.Plot(made, caption))
  rows = [
    [
      ROWS[name].title if name in ROWS else name,
      *(
        spread(at(values, name, share, i))
        for share in (0.25, 0.5)
        for i in (0, 1, 2)
      ),
    ]
    for name in values['curves']
  ]
  head = [
    'selector',
    *(
      f'{what} at {share}'
      for share in (0.25, 0.5)
      for what in ('keys', 'mass', 'error')
    ),
  ]
  note = (
    'Budgets are a share of the keys or of the mass, whichever the method '
    'counts. Errors are of the outputs for independent normal values, relative '
    'to those of attention.'
  )
  return [*plots, page.Table(head, rows), page.Text(note, note=True)]
