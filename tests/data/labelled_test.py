"""Labelled sequences: tokens, padding, classes and what is no label."""

import itertools
import json

import datasets
import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import digits

NAMES = ('pos', 'neg', 'mixed')
RECORDS = [
  {'text': f'{i} ' + 'é' * (i % 9), 'label': NAMES[i % 3], 'stars': i % 3 + 1}
  for i in range(60)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hf')


def _write(folder, records=RECORDS):
  path = folder / 'a.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  return str(path)


def _load(path, key='label', batch_size=4, **options):
  config = DataConfig(path=path, label_key=key, seq_len=12, **options)
  return data.load(data.complete(config), batch_size=batch_size)


def _examples(batches):
  """Returns {document: (class, segment ids)} of what counts."""
  found = {}
  for batch in batches:
    for i in np.flatnonzero(batch['weight']):
      tokens = tuple(batch['tokens'][i].tolist())
      assert tokens not in found
      ids = batch['segment_ids'][i].tolist()
      found[tokens] = int(batch['label'][i]), ids
  return found


def _expected(records, key, classes):
  found = {}
  for record in records:
    ids = [*record['text'].encode(), 0][:12]
    rest = [0] * (12 - len(ids))
    found[(*ids, *rest)] = classes[record[key]], [1] * len(ids) + rest
  return found


@pytest.mark.parametrize(
  'key, classes',
  [('label', {'mixed': 0, 'neg': 1, 'pos': 2}), ('stars', {1: 0, 2: 1, 3: 2})],
)
@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_documents_are_cut_or_padded(tmp_path, key, classes, kind):
  path = _write(tmp_path)
  if kind == 'parquet':
    path = str(tmp_path / 'a.parquet')
    datasets.Dataset.from_list(RECORDS).to_parquet(path)
  loaded = _load(path, key, batch_size=5)
  assert loaded.num_classes == 3 and loaded.vocab_size == 256
  names = ', '.join(f'{i} {name}' for name, i in classes.items())
  assert loaded.notes == (f'classes: {names}',)
  held = data.batches.held_out(60, 20)
  train = [r for r, out in zip(RECORDS, held, strict=True) if not out]
  valid = [r for r, out in zip(RECORDS, held, strict=True) if out]
  assert _examples(loaded.valid) == _expected(valid, key, classes)
  # An epoch has each document once, in a new order.
  epoch = _examples(itertools.islice(loaded.train, len(train) // 5))
  expected = _expected(train, key, classes)
  assert epoch == expected and list(epoch) != list(expected)


def test_empty_documents_have_an_end(tmp_path):
  loaded = _load(_write(tmp_path, [*RECORDS, {'text': '', 'label': 'pos'}] * 2))
  empty = [
    (batch['segment_ids'][i].sum(), batch['weight'][i])
    for batch in itertools.islice(loaded.train, 40)
    for i in range(4)
    if not batch['tokens'][i].any()
  ]
  assert empty and set(empty) == {(1, 1)}


def test_damaged_records_do_not_count(tmp_path, caplog):
  bad = [
    {'text': 'a', 'label': None},
    {'text': 'a'},
    {'text': 3, 'label': 'pos'},
  ]
  loaded = _load(_write(tmp_path, [*RECORDS[:30], *bad, *RECORDS[30:]]))
  assert loaded.num_classes == 3
  for batch in (*itertools.islice(loaded.train, 30), *loaded.valid):
    empty = ~batch['segment_ids'].any(1)
    np.testing.assert_array_equal(batch['weight'], ~empty)
    assert (batch['tokens'][:, 0] != ord('a')).all()
  assert 'holds NoneType, not an int or a str' in caplog.text


def test_words_of_a_tokenizer_without_an_end(tmp_path):
  vocab = {'[UNK]': 0, **{str(i): i + 1 for i in range(60)}}
  model = tokenizers.models.WordLevel(vocab, '[UNK]')
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.save(str(tmp_path / 'tokenizer.json'))
  records = [*RECORDS[:30], {'text': ' ', 'label': 'pos'}, *RECORDS[30:]]
  loaded = _load(
    _write(tmp_path, records), tokenizer=str(tmp_path / 'tokenizer.json')
  )
  batches = [*itertools.islice(loaded.train, 15), *loaded.valid]
  counts = np.concatenate([b['segment_ids'].sum(1) for b in batches])
  assert set(counts) == {0, 1, 2}
  weights = np.concatenate([b['weight'] for b in batches])
  np.testing.assert_array_equal(weights, counts > 0)  # nothing to read


def test_pixels_are_the_digits(tmp_path):
  loaded = data.load(DataConfig(name='pixels'), batch_size=100)
  assert data.kind_of(DataConfig(name='pixels')) == 'labelled'
  assert (loaded.vocab_size, loaded.num_classes) == (17, 10)
  assert data.row_tokens(loaded.example) == 64
  for split, batches in (
    (False, itertools.islice(loaded.train, 15)),
    (True, loaded.valid),
  ):
    images, labels = digits.split(valid=split)
    expected = {
      (*image.ravel().astype(int).tolist(), int(label))
      for image, label in zip(images, labels, strict=True)
    }
    found = [
      (*b['tokens'][i].tolist(), int(b['label'][i]))
      for b in batches
      for i in np.flatnonzero(b['weight'])
    ]
    assert set(found) == expected and len(found) == len(expected)
  shapes = {k: (x.shape, x.dtype) for k, x in loaded.example.items()}
  assert shapes == {
    'tokens': ((64,), np.int32),
    'segment_ids': ((64,), np.int32),
    'label': ((), np.int32),
    'weight': ((), np.float32),
  }


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'key': 'lable'}, "data.label_key='lable' is not in the records; did you"),
    ({'key': 'id'}, "data.label_key='id' holds float, not an int or a str"),
    ({'key': 'one'}, "data.label_key='one' holds 'x' in all records; name"),
    ({'key': 'both'}, "data.label_key='both' holds ints and strings"),
    ({'corruption': 'mask'}, "data.corruption='mask'; leave one"),
    ({'mixture': {'a': {'path': 'x'}}}, 'is not possible with data.mixture='),
    ({'packing': 'segments'}, "use 'concat'"),
    ({'path': ''}, 'text files have no keys'),
  ],
)
def test_mistakes_are_one_line(tmp_path, changes, message):
  extra = {'id': 0.5, 'one': 'x'}
  records = [r | extra | {'both': i % 2 or 'x'} for i, r in enumerate(RECORDS)]
  path = _write(tmp_path, records)
  with pytest.raises(ConfigError) as caught:
    _load(**{'path': path} | changes)
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_other_data_has_no_labels():
  with pytest.raises(ConfigError, match="data.label_key='x' is not a key of"):
    data.complete(DataConfig(name='digits', label_key='x'))
