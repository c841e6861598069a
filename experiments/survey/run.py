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
from experiments.provenance import commit, constraints, fingerprint
from experiments.survey.claim import NOT_HERE, Claim


def chosen(
  claims: Mapping[str, Claim], tiers: Sequence[str], only: Sequence[str]
) -> dict[str, Claim]:
  """Returns the claims of these tiers, or those named."""
  if only:
    return {name: claims[name] for name in only}
  return {name: c for name, c in claims.items() if c.tier in tiers}


def origin(claim: Claim) -> dict:
  """Returns what a measurement made now was made with."""
  return machine() | dict(
    commit=commit(), seeds=list(claim.seeds), code=fingerprint(claim.measure)
  )


def outdated(claim: Claim, found: Mapping) -> bool:
  """Whether the code has changed that measured what was found."""
  return found['code'] != fingerprint(claim.measure)


def fits(claim: Claim, found: Mapping) -> bool:
  """Whether the rules can read what was found, which other code may have."""
  try:
    verdicts(claim, found)
    return True
  except (KeyError, IndexError, TypeError, AttributeError):
    if outdated(claim, found):
      return False
    raise


def measure(
  claims: Mapping[str, Claim], out: pathlib.Path, again: bool = False
) -> dict:
  """Measures what `out/results.json` does not hold yet, with a progress bar.

  A claim is measured again if that raised, was made on another device or by
  other versions, or if other code found values that the rules cannot read.

  Args:
    claims: by name.
    out: the folder, which gets the constraints that reproduce the versions too.
    again: whether to measure again also what other code measured.

  Returns:
    The record: by claim its values or an error, and what it was made with.
  """
  out.mkdir(parents=True, exist_ok=True)
  file = out / 'results.json'
  record = dict(constraints='constraints.txt', claims={})
  if file.exists():
    try:
      record['claims'] = json.loads(file.read_bytes())['claims']
    except ValueError as e:
      raise ConfigError(
        f'{file} is damaged: {e}; delete it to measure anew'
      ) from None
  here = machine()

  def known(name: str) -> bool:
    found = record['claims'].get(name, {})
    same = all(found.get(key) == here[key] for key in ('device', 'versions'))
    if 'values' not in found or not same or not fits(claims[name], found):
      return False
    return not (again and outdated(claims[name], found))

  todo = [name for name in claims if not known(name)]
  made = {name: origin(claims[name]) for name in todo}  # by the code of now
  bar = tqdm(todo, unit='claim')
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
    record['claims'][name] = found | made[name]
    new = file.with_suffix('.new')
    new.write_text(json.dumps(record, indent=1) + '\n')
    new.replace(file)
    (out / record['constraints']).write_text(constraints())
  return record


def verdicts(claim: Claim, found: Mapping) -> list[str]:
  """Returns the verdict of each statement: computed, never stored."""
  if 'error' in found:
    return ['ERROR'] * len(claim.statements)
  if found['values'] is None:
    return [NOT_HERE] * len(claim.statements)
  return [statement.judge(found['values']) for statement in claim.statements]
