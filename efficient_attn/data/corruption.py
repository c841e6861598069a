"""Corruption of rows of text: masked tokens (BERT) or spans to restore (T5).

`data.corruption='mask'` (Devlin et al. 1810.04805): of the tokens of a row,
`data.corruption_rate` are chosen, without replacement and never the end of a
document. Of the chosen ones 80 % become the mask token, 10 % a random one and
10 % stay. Batches are `dict(tokens, labels, segment_ids, positions [B, seq_len]
int32, weights [B, seq_len] float32)`, with weight 1 where a token was chosen.

`data.corruption='spans'` (Raffel et al. 1910.10683): the same share of a row is
cut out in spans of `data.span_length` tokens on average, which alternate with
what is kept and begin with it. With sentinels <0>, <1>, ... and the end token:

  inputs:   kept <0> kept <1> ... end
  targets:  end <0> span <0> <1> span <1> ... end

A row has as many tokens as leave `seq_len` inputs. Batches are `dict(inputs,
input_segment_ids [B, seq_len], targets, target_segment_ids [B, T + 1])`, all
int32, with segment id 1 for tokens and 0 for padding. `targets[:, :-1]` is what
a decoder reads and `targets[:, 1:]` what it predicts.

Both append their tokens to the tokenizer's vocabulary: the mask token, unless
the tokenizer has one; one sentinel a span, and an end token, unless the
tokenizer has one. A generator decides everything else, so that the same seed
corrupts alike.
"""

import bisect

import jax
import numpy as np

from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data.tokenizer import Tokenizer

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the others stay
KINDS = {'mask': 'masked', 'spans': 'spans'}  # of batches
# Keys of the data that each reads.
READS = {
  '': (),
  'mask': ('corruption_rate',),
  'spans': ('corruption_rate', 'span_length'),
}


def check_keys(config: DataConfig) -> None:
  """Raises when a key is set that the corruption of a config does not read."""
  default = DataConfig()
  for key in READS['spans']:
    value = getattr(config, key)
    able = [name for name, keys in READS.items() if key in keys]
    if value != getattr(default, key) and config.corruption not in able:
      raise ConfigError(
        f'data.{key}={value!r} is not read with data.corruption='
        f'{config.corruption!r}, but with {" or ".join(map(repr, able))}; '
        'leave it out'
      )


class Mask:
  """Corrupts a row as BERT does.

  Attributes:
    length: tokens of a row.
    vocab_size: of the tokenizer, and the mask token.
    example: shapes of a corrupted row.
  """

  def __init__(self, config: DataConfig, tokenizer: Tokenizer):
    self.length, self._rate = config.seq_len, config.corruption_rate
    self._mask = tokenizer.mask_id
    self.vocab_size = tokenizer.vocab_size
    if self._mask is None:
      self._mask = self.vocab_size
      self.vocab_size += 1
    specials = [i for i in (tokenizer.eos_id, self._mask) if i is not None]
    special = np.isin(np.arange(self.vocab_size), specials)
    self._usual = ~special
    words = tokenizer.known & ~special[: tokenizer.vocab_size]
    self._words = np.flatnonzero(words).astype(np.int32)
    if not len(self._words):
      raise ConfigError(
        f'data.tokenizer={config.tokenizer!r} has no token but its special '
        "ones, and data.corruption='mask' draws others"
      )
    names = ('tokens', 'labels', 'segment_ids', 'positions', 'weights')
    self.example = dict.fromkeys(names, _row(self.length)) | {
      'weights': _row(self.length, np.float32)
    }

  def __call__(self, row, rng: np.random.Generator):
    """Returns the corrupted row; `row` has a token of the row before it."""
    labels, ids = row['tokens'][1:], row['segment_ids'][1:]
    able = np.flatnonzero((ids > 0) & self._usual[labels])
    count = min(max(round(self._rate * len(able)), 1), len(able))
    chosen = rng.choice(able, count, replace=False)
    luck = rng.random(count)
    tokens = labels.copy()
    tokens[chosen[luck < MASKED]] = self._mask
    random = chosen[luck >= 1 - RANDOM]
    tokens[random] = rng.choice(self._words, len(random))
    weights = np.zeros(len(tokens), np.float32)
    weights[chosen] = 1
    return dict(
      tokens=tokens,
      labels=np.where(weights > 0, labels, 0),
      segment_ids=ids,
      positions=positions(ids),
      weights=weights,
    )


class Spans:
  """Corrupts a row as T5 does; attributes as those of `Mask`."""

  def __init__(self, config: DataConfig, tokenizer: Tokenizer):
    if config.packing == 'segments':
      raise ConfigError(
        "data.packing='segments' does not keep documents apart in "
        "data.corruption='spans', whose spans cross them; use "
        "data.packing='concat'"
      )
    self._rate, self._mean = config.corruption_rate, config.span_length
    self._size = config.seq_len
    # More tokens never leave fewer inputs.
    longest = int((self._size + 2) / (1 - self._rate)) + 2
    self.length = bisect.bisect_right(
      range(longest), self._size, key=lambda n: self._sizes(n)[0]
    )
    self.length -= 1  # the last one that fits
    if self.length < 2:
      raise ConfigError(
        f"data.seq_len={config.seq_len} has no room for data.corruption='spans'"
        ', a token, a sentinel and an end; use 3 or more'
      )
    _, self._target_size, spans = self._sizes(self.length)
    self._first = tokenizer.vocab_size
    self.vocab_size = self._first + spans
    self._end = tokenizer.eos_id
    if self._end is None:
      self._end = self.vocab_size
      self.vocab_size += 1
    inputs, targets = _row(self._size), _row(self._target_size + 1)
    self.example = dict(
      inputs=inputs,
      input_segment_ids=inputs,
      targets=targets,
      target_segment_ids=targets,
    )

  def _counts(self, length):
    """Returns how many tokens are cut out, and in how many spans."""
    noise = min(max(round(length * self._rate), 1), length - 1)
    spans = min(max(round(noise / self._mean), 1), noise, length - noise)
    return max(noise, 0), max(spans, 0)

  def _sizes(self, length):
    """Returns the numbers of inputs, of predicted targets and of spans."""
    noise, spans = self._counts(length)
    return length - noise + spans + 1, noise + spans + 1, spans

  def __call__(self, row, rng: np.random.Generator):
    """Returns inputs and targets; `row` has a token of the row before it."""
    tokens = row['tokens'][1:][row['segment_ids'][1:] > 0]
    noise, spans = self._counts(len(tokens))
    lengths = np.stack(
      [_divide(len(tokens) - noise, spans, rng), _divide(noise, spans, rng)],
      axis=1,
    )
    rest = len(tokens) - lengths.sum()  # of a row too short to cut
    cut = np.repeat(np.arange(2 * spans) % 2 == 1, lengths.ravel())
    cut = np.append(cut, np.zeros(rest, bool))
    starts = cut & ~np.insert(cut[:-1], 0, False)
    sentinels = self._first + np.arange(spans)
    inputs = tokens.copy()
    inputs[starts] = sentinels
    inputs = inputs[~cut | starts]
    targets = np.insert(
      tokens[cut], np.cumsum(lengths[:, 1]) - lengths[:, 1], sentinels
    )
    inputs = np.append(inputs, self._end)
    targets = np.concatenate([[self._end], targets, [self._end]])
    return dict(
      inputs=_padded(inputs, self._size),
      input_segment_ids=_padded(np.ones_like(inputs), self._size),
      targets=_padded(targets, self._target_size + 1),
      target_segment_ids=_padded(np.ones_like(targets), self._target_size + 1),
    )


CORRUPTIONS = {'mask': Mask, 'spans': Spans}


def positions(ids: np.ndarray) -> np.ndarray:
  """Returns int32 positions that begin anew where the segment id changes."""
  index = np.arange(len(ids), dtype=np.int32)
  changes = np.concatenate([[True], ids[1:] != ids[:-1]])
  return index - np.maximum.accumulate(index * changes)


def _divide(total, parts, rng):
  """Returns `parts` positive numbers that add up to `total`, at random."""
  if not parts:
    return np.zeros(0, int)
  cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
  return np.diff(np.concatenate([[0], cuts, [total]]))


def _padded(array, size):
  padded = np.zeros(size, np.int32)
  padded[: len(array)] = array
  return padded


def _row(length, dtype=np.int32):
  return jax.ShapeDtypeStruct((length,), dtype)
