"""Corrupted rows are those of the papers, and nothing of the text is lost."""

import collections
import itertools

import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data.corruption import Mask, Spans
from efficient_attn.data.tokenizer import ByteTokenizer

TEXT = ''.join(f'line {i} of a text\n' for i in range(400))


@pytest.fixture
def path(tmp_path):
  (tmp_path / 'a.txt').write_text(TEXT)
  return str(tmp_path / 'a.txt')


def _words(folder, specials):
  """Writes a tokenizer of words with some special tokens."""
  names = {word for word in TEXT.split()}
  vocab = {name: i for i, name in enumerate([*specials, *sorted(names)])}
  model = tokenizers.models.WordLevel(vocab, 'line')
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(folder / 'tokenizer.json'))
  return str(folder / 'tokenizer.json'), len(vocab)


def _load(path, corruption, batch_size=4, seed=0, **options):
  config = DataConfig(path=path, corruption=corruption, **options)
  return data.load(config, batch_size=batch_size, seed=seed)


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _assert_example(found, batch):
  shapes = {k: (x.shape, x.dtype) for k, x in found.example.items()}
  assert {k: (x.shape[1:], x.dtype) for k, x in batch.items()} == shapes


@pytest.mark.parametrize('packing', ['concat', 'segments'])
def test_masks_are_as_bert_draws_them(path, packing):
  found = _load(path, 'mask', seq_len=100, packing=packing)
  assert found.vocab_size == 257
  counts = collections.Counter()
  batches = _take(found.train, 60)
  _assert_example(found, batches[0])
  for batch in batches:
    chosen = batch['weights'] > 0
    tokens, labels = batch['tokens'][chosen], batch['labels'][chosen]
    assert (batch['labels'][~chosen] == 0).all()
    able = (batch['tokens'] != 0) & (batch['segment_ids'] > 0)
    per_row = np.round(0.15 * able.sum(1))
    np.testing.assert_array_equal(chosen.sum(1), per_row)
    assert (labels > 0).all()  # never the end of a document
    assert 0 not in tokens and 256 not in batch['tokens'][~chosen]
    counts['masked'] += (tokens == 256).sum()
    counts['random'] += ((tokens != 256) & (tokens != labels)).sum()
    counts['kept'] += (tokens == labels).sum()
  total = counts.total()
  assert abs(counts['masked'] / total - 0.8) < 0.03
  assert abs(counts['random'] / total - 0.1) < 0.02


@pytest.mark.parametrize('packing', ['concat', 'segments'])
def test_masked_rows_restore_to_the_text(path, packing):
  options = dict(seq_len=64, packing=packing)
  found = _load(path, 'mask', **options)
  plain = data.load(DataConfig(path=path, **options), batch_size=4)
  pairs = zip(_take(found.train, 30), _take(plain.train, 30), strict=True)
  valid = zip(found.valid, plain.valid, strict=True)
  for ours, theirs in (*pairs, *valid):
    chosen = ours['weights'] > 0
    restored = np.where(chosen, ours['labels'], ours['tokens'])
    np.testing.assert_array_equal(restored, theirs['tokens'][:, 1:])
    ids = theirs['segment_ids'][:, 1:]
    np.testing.assert_array_equal(ours['segment_ids'], ids)
    assert (ids[chosen] > 0).all()
    for row, places in zip(ids, ours['positions'], strict=True):
      for segment in np.unique(row[row > 0]):  # not in rows of padding
        (where,) = np.nonzero(row == segment)
        np.testing.assert_array_equal(places[where], np.arange(len(where)))


def _restored(batch, first):
  """Puts the spans of the targets where their sentinels are in the inputs."""
  rows = []
  for i in range(len(batch['inputs'])):
    inputs, targets = (
      batch[f'{name}s'][i][batch[f'{name}_segment_ids'][i] > 0].tolist()
      for name in ('input', 'target')
    )
    if not inputs:
      continue
    end = targets[0]
    assert inputs.pop() == targets[-1] == end
    spans = collections.defaultdict(list)
    for token in targets[1:-1]:
      if token >= first:
        current = spans[token]
      else:
        current.append(token)
    assert list(spans) == list(range(first, first + len(spans)))
    assert [t for t in inputs if t >= first] == list(spans)
    rows += [t for x in inputs for t in (spans[x] if x >= first else [x])]
  return rows


def test_spans_restore_to_the_text(path):
  found = _load(path, 'spans', seq_len=512)
  length = Spans(DataConfig(seq_len=512), ByteTokenizer()).length
  # The sizes that T5's code computes for 512 inputs: 568 tokens, 114 targets.
  assert length == 568
  batches = _take(found.train, 40)
  _assert_example(found, batches[0])
  assert batches[0]['targets'].shape == (4, 114 + 1)
  assert found.vocab_size == 256 + 28
  plain = data.load(DataConfig(path=path, seq_len=length), batch_size=4)
  for ours, theirs in zip(batches, plain.train, strict=False):
    assert ours['input_segment_ids'].all() and ours['target_segment_ids'].all()
    assert _restored(ours, 256) == theirs['tokens'][:, 1:].ravel().tolist()
  valid = [token for b in found.valid for token in _restored(b, 256)]
  stored = plain.valid_bytes() + b'\0'
  assert bytes(valid) == stored


def test_spans_are_as_long_as_asked_and_differ_from_row_to_row(path):
  found = _load(path, 'spans', seq_len=64, corruption_rate=0.5, span_length=5.0)
  starts, lengths = set(), []
  for batch in _take(found.train, 30):
    for inputs, targets in zip(batch['inputs'], batch['targets'], strict=True):
      starts.add(tuple(np.flatnonzero(inputs >= 256)))
      (where,) = np.nonzero(np.append(targets[:-1] >= 256, True))
      lengths += (np.diff(where) - 1).tolist()
  assert len(starts) > 100
  assert min(lengths) == 1 and abs(np.mean(lengths) - 5) < 0.3


@pytest.mark.parametrize('rate', [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize('mean', [1.0, 3.0, 10.0])
def test_a_row_leaves_as_many_inputs_as_fit(rate, mean):
  for seq_len in range(3, 60):
    config = DataConfig(seq_len=seq_len, corruption_rate=rate, span_length=mean)
    spans = Spans(config, ByteTokenizer())
    fit = [n for n in range(2, 1000) if spans._sizes(n)[0] <= seq_len]
    assert spans.length == fit[-1]
    rng = np.random.default_rng(0)
    for n in {1, 2, 3, spans.length - 1, spans.length}:
      if n > spans.length:
        continue
      row = dict(
        tokens=np.arange(n + 1, dtype=np.int32) % 256,
        segment_ids=np.ones(n + 1, np.int32),
      )
      batch = {k: x[None] for k, x in spans(row, rng).items()}
      assert _restored(batch, 256) == [t % 256 for t in range(1, n + 1)]


@pytest.mark.parametrize('corruption', ['mask', 'spans'])
def test_each_epoch_is_drawn_anew_and_validation_is_not(path, corruption):
  found = _load(path, corruption, seq_len=32, batch_size=2, seed=3)
  name = 'tokens' if corruption == 'mask' else 'inputs'
  epochs = 4 * len(TEXT) // (2 * 30)
  rows = [tuple(r) for b in _take(found.train, epochs) for r in b[name]]
  assert len(set(rows)) > 0.95 * len(rows)
  first, again = list(found.valid), list(found.valid)
  other = list(_load(path, corruption, seq_len=32, batch_size=2, seed=4).valid)
  for a, b, c in zip(first, again, other, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
      np.testing.assert_array_equal(a[key], c[key])


def test_rows_without_words_have_nothing_to_restore():
  corrupt = Mask(DataConfig(seq_len=4, corruption='mask'), ByteTokenizer())
  row = dict(tokens=np.zeros(5, np.int32), segment_ids=np.ones(5, np.int32))
  found = corrupt(row, np.random.default_rng(0))
  assert not found['weights'].any() and not found['tokens'].any()


def test_rows_of_a_batch_are_drawn_apart(tmp_path):
  (tmp_path / 'a.txt').write_text('x' * 5000)
  found = _load(str(tmp_path / 'a.txt'), 'mask', seq_len=64, batch_size=8)
  batch = next(iter(found.train))
  assert len({tuple(row) for row in batch['weights']}) == 8


def test_the_mask_of_a_tokenizer_is_used(path, tmp_path):
  file, size = _words(tmp_path, ['[PAD]', '[MASK]', '[SEP]'])
  found = _load(path, 'mask', seq_len=32, tokenizer=file)
  assert found.vocab_size == size
  for batch in _take(found.train, 10):
    chosen = batch['weights'] > 0
    assert (batch['tokens'][chosen] == 1).mean() > 0.5
    assert (batch['tokens'][chosen] != 2).all()
  assert 'bytes' not in batch
  (tmp_path / 'tokenizer_config.json').write_text('{"mask_token": "[PAD]"}')
  batch = next(iter(_load(path, 'mask', seq_len=32, tokenizer=file).train))
  assert (batch['tokens'][batch['weights'] > 0] == 0).mean() > 0.5


def test_a_tokenizer_without_an_end_gets_one(path, tmp_path):
  file, size = _words(tmp_path, ['[PAD]'])
  assert _load(path, 'mask', seq_len=32, tokenizer=file).vocab_size == size + 1
  found = _load(path, 'spans', seq_len=32, tokenizer=file)
  batch = next(iter(found.train))
  end = found.vocab_size - 1
  spans = (batch['inputs'][0] >= size).sum() - 1
  assert end == size + spans
  assert (batch['targets'][:, [0, -1]] == end).all()
  assert (batch['inputs'][:, -1] == end).all()


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(corruption='mlm'), "data.corruption='mlm' is unknown"),
    (dict(corruption_rate=0.0), 'data.corruption_rate=0.0 must be in'),
    (dict(corruption_rate=1.0), 'data.corruption_rate=1.0 must be in'),
    (dict(span_length=0.5), 'data.span_length=0.5 must be >= 1'),
    (dict(corruption='spans', packing='segments'), "use data.packing='concat'"),
    (dict(corruption='spans', seq_len=2), 'data.seq_len=2 has no room'),
    (
      dict(corruption_rate=0.3),
      "data.corruption_rate=0.3 is not read with data.corruption='', but with "
      "'mask' or 'spans'",
    ),
    (
      dict(corruption='mask', span_length=5.0),
      "data.span_length=5.0 is not read with data.corruption='mask'",
    ),
    (
      dict(name='mqar', corruption='mask'),
      "data.corruption='mask' is not a key of data.name='mqar'",
    ),
  ],
)
def test_mistakes_are_one_line(changes, message):
  with pytest.raises(ConfigError) as caught:
    config = data.complete(DataConfig(**changes))
    data.load(config, batch_size=2)
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_kinds_and_what_a_model_reads_of_a_row(path):
  kinds = {'': 'text', 'mask': 'masked', 'spans': 'spans'}
  for corruption, kind in kinds.items():
    config = DataConfig(path=path, corruption=corruption, seq_len=32)
    assert data.kind_of(config) == kind
    assert data.row_tokens(data.load(config, batch_size=1).example) == 32
  digits, task = DataConfig(name='digits'), DataConfig(name='image_sequence')
  found = [data.load(config, batch_size=1).example for config in (digits, task)]
  assert list(map(data.row_tokens, found)) == [0, 64]
  assert [data.kind_of(c) for c in (digits, task)] == ['images', 'task']
