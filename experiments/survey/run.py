"""Measures claims one by one, and keeps every measurement at once."""

import json
import pathlib
import time
import traceback
from collections.abc import Mapping, Sequence

import jax
from tqdm import tqdm

from efficient_attn.config import ConfigError
from experiments.machine import machine
from experiments.survey.claim import NOT_HERE, Claim


def chosen(
  claims: Mapping[str, Claim], tiers: Sequence[str], only: Sequence[str]
) -> dict[str, Claim]:
  """Returns the claims of these tiers, or those named."""
  if only:
    return {name: claims[name] for name in only}
  return {name: c for name, c in claims.items() if c.tier in tiers}


def measure(claims: Mapping[str, Claim], out: pathlib.Path) -> dict:
  """Measures what `out/results.json` does not hold yet, with a progress bar.

  A claim whose measurement raises is stored as an error, and measured again
  by the next call.

  Returns:
    The record: the machine, and values or an error by claim.
  """
  out.mkdir(parents=True, exist_ok=True)
  file = out / 'results.json'
  record = machine() | dict(claims={})
  if file.exists():
    try:
      before = json.loads(file.read_bytes())
    except ValueError as e:
      raise ConfigError(
        f'{file} is damaged: {e}; delete it to measure anew'
      ) from None
    same = all(before.get(key) == record[key] for key in ('device', 'versions'))
    record['claims'] = before['claims'] if same else {}
  done = {n for n, found in record['claims'].items() if 'values' in found}
  bar = tqdm([name for name in claims if name not in done], unit='claim')
  for name in bar:
    bar.set_description(f'{name} {claims[name].title[:50]}')
    start = time.perf_counter()
    try:
      if claims[name].tier == 'c' and jax.default_backend() == 'cpu':
        found = dict(values=None)
      else:
        found = dict(values=claims[name].measure())
    except Exception:  # one failing claim must not stop the others
      found = dict(error=traceback.format_exc(limit=-3))
    found['seconds'] = round(time.perf_counter() - start, 2)
    record['claims'][name] = found
    new = file.with_suffix('.new')
    new.write_text(json.dumps(record, indent=1) + '\n')
    new.replace(file)
  return record


def verdicts(claim: Claim, found: Mapping) -> list[str]:
  """Returns the verdict of each statement: computed, never stored."""
  if 'error' in found:
    return ['ERROR'] * len(claim.statements)
  if found['values'] is None:
    return [NOT_HERE] * len(claim.statements)
  return [statement.judge(found['values']) for statement in claim.statements]
