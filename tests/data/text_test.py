"""What is in the rows: every token once, documents apart, files mixed."""

import collections
import itertools
import json

import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import DataConfig

TEXTS = [f'<{i}>' + 'ab é\n' * (i * 7 % 40) for i in range(50)]


@pytest.fixture
def corpus(tmp_path):
  lines = [json.dumps({'text': text}) for text in TEXTS]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  for i, text in enumerate(TEXTS):
    (tmp_path / f'{i:02}.txt').write_text(text)
  return tmp_path


@pytest.fixture(params=[None, '<|endoftext|>'], ids=['no_end', 'end'])
def subwords(request, tmp_path):
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = byte_level(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(
    TEXTS,
    tokenizers.trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=[request.param] if request.param else [],
      initial_alphabet=byte_level.alphabet(),
      show_progress=False,
    ),
  )
  model.save(str(tmp_path / 'tokenizer.json'))
  return str(tmp_path / 'tokenizer.json')


def _targets(batches):
  """Returns the (input, target) pairs that count, as the loss picks them."""
  pairs = []
  for batch in batches:
    tokens, ids = batch['tokens'], batch['segment_ids']
    counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
    pairs += zip(tokens[:, :-1][counts], tokens[:, 1:][counts], strict=True)
  return np.array(pairs)


def _counted(batch):
  """Returns the bytes of the targets that count."""
  ids = batch['segment_ids']
  counts = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] > 0)
  return batch['bytes'][:, 1:] * counts


def _documents(targets, end=0):
  """Splits a stream of targets at the end token."""
  text = bytes(targets.tolist())
  *whole, rest = text.split(bytes([end]))
  assert not rest
  return [document.decode() for document in whole]


@pytest.mark.parametrize('packing', ['concat', 'segments'])
@pytest.mark.parametrize('files', ['*.txt', 'a.jsonl'])
@pytest.mark.parametrize('seq_len', [5, 64, 1000])
def test_validation_counts_every_byte_once(corpus, files, packing, seq_len):
  config = DataConfig(
    path=str(corpus / files), packing=packing, seq_len=seq_len, valid_every=4
  )
  loaded = data.load(config, batch_size=3)
  pairs = _targets(loaded.valid)
  documents = _documents(pairs[:, 1])
  assert ''.join(documents) == loaded.valid_bytes().decode()
  assert set(documents) < set(TEXTS) and len(documents) > 5
  # Each is predicted from the one before it; the first, from the end token.
  np.testing.assert_array_equal(pairs[1:, 0], pairs[:-1, 1])
  assert pairs[0, 0] == 0
  shapes = {batch['tokens'].shape for batch in loaded.valid}
  assert shapes == {(3, seq_len + 1)}


@pytest.mark.parametrize('files', ['*.txt', 'a.jsonl'])
def test_an_epoch_is_every_document_once(corpus, files):
  config = DataConfig(path=str(corpus / files), seq_len=16, valid_every=4)
  loaded = data.load(config, batch_size=1)
  held = _documents(_targets(loaded.valid)[:, 1])
  left = sorted(set(TEXTS) - set(held))
  total = sum(len(text.encode()) + 1 for text in left)
  rows = itertools.islice(loaded.train, -(-total // 16))
  tokens = np.concatenate([row['tokens'][0, 1:] for row in rows])[:total]
  stored = '\0'.join([*left, '']).encode()
  assert collections.Counter(tokens.tolist()) == collections.Counter(stored)
  if files == 'a.jsonl':  # whole documents, in a new order
    documents = _documents(tokens)
    assert sorted(documents) == left and documents != left


def test_files_are_cut_into_exact_rows(tmp_path):
  rng = np.random.default_rng(0)
  stream = bytes(rng.integers(1, 256, 16 * 20 - 2).tolist())
  (tmp_path / 'a.txt').write_bytes(stream[:100])
  (tmp_path / 'b.txt').write_bytes(stream[100:])
  (tmp_path / 'v.txt').write_bytes(b'valid')
  config = DataConfig(
    path=str(tmp_path / '[ab].txt'),
    valid_path=str(tmp_path / 'v.txt'),
    seq_len=16,
  )
  batches = iter(data.load(config, batch_size=4).train)
  stream = b'\0' + stream[:100] + b'\0' + stream[100:] + b'\0'
  expected = {stream[i : i + 17] for i in range(0, 320, 16)}
  for _ in range(2):  # epochs
    rows = [
      bytes(r) for _ in range(5) for r in next(batches)['tokens'].tolist()
    ]
    assert set(rows) == expected and len(rows) == 20


def test_a_batch_mixes_files(tmp_path):
  for i in range(20):
    (tmp_path / f'{i}.txt').write_text(chr(65 + i) * 5000)
  config = DataConfig(path=str(tmp_path / '*.txt'), seq_len=64)
  mixed = [
    len(np.unique(batch['tokens'][:, 5]))
    for batch in itertools.islice(data.load(config, batch_size=8).train, 30)
  ]
  assert np.mean(mixed) > 6  # 8 draws out of 20 are 6.7 different ones


def test_rows_of_long_records_come_from_different_ones(tmp_path):
  lines = [json.dumps({'text': chr(65 + i) * 5000}) for i in range(20)]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  config = DataConfig(path=str(tmp_path / 'a.jsonl'), seq_len=64, valid_every=9)
  for batch in itertools.islice(data.load(config, batch_size=8).train, 20):
    assert len(np.unique(batch['tokens'][:, -1])) == 8


def test_concat_has_one_segment_and_no_padding(corpus):
  config = DataConfig(path=str(corpus / 'a.jsonl'), seq_len=32)
  for batch in itertools.islice(data.load(config, batch_size=4).train, 20):
    assert (batch['segment_ids'] == 1).all()
    assert (batch['positions'] == np.arange(33)).all()


@pytest.mark.parametrize('files', ['*.txt', 'a.jsonl'])
def test_segments_and_positions_restart_at_documents(corpus, files):
  config = DataConfig(path=str(corpus / files), seq_len=128, packing='segments')
  loaded = data.load(config, batch_size=4)
  restarts = 0
  for batch in (*itertools.islice(loaded.train, 20), *loaded.valid):
    for tokens, ids, positions in zip(
      batch['tokens'], batch['segment_ids'], batch['positions'], strict=True
    ):
      for segment in range(1, ids.max() + 1):
        (where,) = np.nonzero(ids == segment)
        assert (np.diff(where) == 1).all()
        assert (positions[where] == np.arange(len(where))).all()
        text = bytes(tokens[where].tolist())
        assert b'\0' not in text[1:-1]  # at most one document
        restarts += text[:1] == b'\0' and where[0] > 1
      assert ids[-1] == ids.max() or ids[-1] == 0
  assert restarts > 20


@pytest.mark.parametrize('packing', ['concat', 'segments'])
@pytest.mark.parametrize('files', ['*.txt', 'a.jsonl'])
def test_subwords(corpus, subwords, files, packing):
  with open(corpus / 'a.jsonl', 'a') as file:
    file.write('\n{"text": ""}\n{"text": null}' * 8)
  config = DataConfig(
    path=str(corpus / files),
    tokenizer=subwords,
    packing=packing,
    seq_len=24,
    valid_every=4,
  )
  loaded = data.load(config, batch_size=3)
  tokenizer = loaded.tokenizer
  targets = _targets(loaded.valid)[:, 1]
  counted = sum(_counted(batch).sum() for batch in loaded.valid)
  raw = loaded.valid_bytes()
  if tokenizer.eos_id is not None:
    assert counted == len(raw)
    ended = targets[targets != tokenizer.eos_id]
    assert tokenizer.decode(ended) == raw.decode()
  else:  # nothing to predict a document's first token from
    assert 0 < len(raw) - counted < 60
    assert bool(loaded.notes) == (packing == 'concat')
  batch = next(iter(loaded.train))
  assert batch['tokens'].shape == (3, 25)
  assert batch['tokens'].max() < tokenizer.vocab_size
  assert (batch['segment_ids'][:, 1:] > 0).all()


@pytest.mark.parametrize('packing', ['concat', 'segments'])
@pytest.mark.parametrize('files', ['*.txt', 'a.jsonl'])
def test_bytes_are_those_of_the_text(corpus, files, packing):
  words = {'[UNK]': 0, 'ab': 1, 'é': 2, '[SEP]': 3}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '[UNK]'))
  model.normalizer = tokenizers.normalizers.BertNormalizer()
  model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  model.save(str(corpus / 'tokenizer.json'))
  with open(corpus / 'a.jsonl', 'a') as file:
    file.write('\n{"text": "\\n \\t"}' * 8)  # of which no token is made
  config = DataConfig(
    path=str(corpus / files),
    tokenizer=str(corpus / 'tokenizer.json'),
    packing=packing,
    seq_len=24,
    valid_every=4,
  )
  loaded = data.load(config, batch_size=3)
  assert loaded.notes == ()
  counted = sum(_counted(batch).sum() for batch in loaded.valid)
  assert counted == len(loaded.valid_bytes())
  batch = next(iter(loaded.train))
  assert batch['bytes'].dtype == np.int32
  assert batch['bytes'].shape == (3, 25)


def test_compressors_are_the_yardstick():
  rates = data.compressed_bits_per_byte(b'abc' * 1000)
  assert set(rates) == {'zlib', 'xz'} and max(rates.values()) < 0.5
  noise = np.random.default_rng(0).bytes(10_000)
  assert min(data.compressed_bits_per_byte(noise).values()) >= 8


def test_example_is_a_row_also_of_subwords(corpus, subwords):
  config = DataConfig(seq_len=8, path=f'{corpus}/*.txt', tokenizer=subwords)
  found = data.load(config, batch_size=2)
  batch = next(iter(found.train))
  shapes = {k: (x.shape[1:], x.dtype) for k, x in batch.items()}
  assert shapes == {k: (x.shape, x.dtype) for k, x in found.example.items()}
