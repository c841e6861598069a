"""Token caches give what the text gives, and are complete or not read."""

import collections
import dataclasses
import itertools
import json
import pickle
import shutil

import numpy as np
import pytest
import tokenizers

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import documents, sources, token_cache, write_tokens

TEXTS = [f'line {i} ' + 'größer  \n' * (i * 7 % 40) for i in range(60)]
TEXTS += ['', '  \n ']  # of which no token is made


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpus')
  lines = [json.dumps({'text': text}) for text in TEXTS]
  (folder / 'a.jsonl').write_text('\n'.join(lines * 2))
  (folder / 'one.txt').write_text(''.join(TEXTS))
  for i, text in enumerate(TEXTS):
    (folder / f'{i:02}.txt').write_text(text)
  vocab = {'[UNK]': 0, 'line': 1, 'größer': 2, '[SEP]': 3}
  vocab |= {str(i): 4 + i for i in range(40)}
  for name, words in (('words', vocab), ('other', vocab | {'x': 44})):
    model = tokenizers.models.WordLevel(words, '[UNK]')
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / f'{name}.json'))
  return folder


def _config(corpus, files='a.jsonl', tokenizer='bytes', **options):
  name = tokenizer if tokenizer == 'bytes' else str(corpus / tokenizer)
  values = dict(path=str(corpus / files), tokenizer=name, valid_every=5)
  return DataConfig(**values | dict(seq_len=16) | options)


def _write(config, folder, **options):
  out = folder / 'a.tokens'
  index, _ = write_tokens.write(config, str(out), **options)
  return dataclasses.replace(config, path=str(out)), index


def _take(batches, count):
  return list(itertools.islice(batches, count))


def _assert_equal(ours, theirs):
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


CASES = list(
  itertools.product(
    ['a.jsonl', '*.txt', 'one.txt'],
    ['bytes', 'words.json'],
    ['concat', 'segments'],
  )
)


@pytest.mark.parametrize('files, tokenizer, packing', CASES)
def test_a_cache_is_read_as_its_text(
  corpus, tmp_path, files, tokenizer, packing
):
  # Documents are longer than a row and than a shard. Where pieces of files end,
  # a tokenizer gives the bytes of white space to another token; here nowhere.
  pieces = files != 'a.jsonl' and tokenizer != 'bytes'
  seq_len = 1000 if pieces else 5
  text = _config(corpus, files, tokenizer, packing=packing, seq_len=seq_len)
  cached, index = _write(text, tmp_path, shard_bytes=700)
  ours, theirs = (data.load(c, batch_size=3) for c in (cached, text))
  if files == 'a.jsonl':
    assert len(index.shards) > 10
  _assert_equal(list(ours.valid), list(theirs.valid))
  assert ours.vocab_size == theirs.vocab_size
  assert ours.example == theirs.example and ours.valid_bytes is None
  # An epoch of training has the same documents, however they are cut.
  assert _train_tokens(cached) == _train_tokens(text)
  if files == 'a.jsonl':  # in the same order, as none is cut
    ours, theirs = (
      data.load(dataclasses.replace(c, seq_len=100), batch_size=3).train
      for c in (cached, text)
    )
    _assert_equal(_take(ours, 30), _take(theirs, 30))


def _train_tokens(config):
  """Returns how often training has each document, as the bytes of its ids."""
  tokenizer = data.load_tokenizer(config.tokenizer)
  layout = sources.Layout(
    999, 32 * config.seq_len, 1, config.tokenizer != 'bytes'
  )
  split = documents.load(config, layout, tokenizer).train
  found = [[]]
  for part in (part for i in range(len(split)) for part in split[i]):
    piece = sources.tokenized(part, tokenizer)
    assert piece.begins == (not found[-1])
    found[-1] += [-1, *piece.ids.tolist()]  # never nothing
    if piece.ends:
      found.append([])
  assert not found.pop() and len(found) > 0
  return collections.Counter(
    tuple(token for token in document if token >= 0) for document in found
  )


def test_pieces_of_long_documents_join_again(corpus, tmp_path):
  config, _ = _write(_config(corpus), tmp_path, shard_bytes=500)
  index = token_cache.read_index(tmp_path / 'a.tokens')
  shards = [
    token_cache.Shard(tmp_path / 'a.tokens', name, index)
    for name in index.names()
  ]
  for piece in (1, 7, 100, 10**6):
    cache = token_cache.Cache(shards, piece, 256)
    parts = [part for i in range(len(cache)) for part in cache[i]]
    documents, last = [], None
    for part in parts:
      assert len(part.ids) <= piece
      if part.begins:
        assert part.previous is None
        documents.append(b'')
      else:
        assert part.previous == last
      documents[-1] += bytes(part.ids.tolist())
      last = part.ids[-1] if len(part.ids) else None
    held = data.batches.held_out(2 * len(TEXTS), 5)
    pairs = list(zip(TEXTS * 2, held, strict=True))
    expected = [t for t, h in pairs if not h] + [t for t, h in pairs if h]
    assert [d.decode() for d in documents] == expected
    again = pickle.loads(pickle.dumps(cache))
    assert not again._maps
    np.testing.assert_array_equal(again[0][0].ids, parts[0].ids)


def test_several_caches_and_another_for_validation(corpus, tmp_path):
  for name in ('one.txt', 'a.jsonl'):
    config = _config(corpus, name)
    write_tokens.write(config, str(tmp_path / f'{name}.tokens'))
  both = dataclasses.replace(config, path=f'{tmp_path}/*.tokens')
  tokens = _valid_tokens(data.load(both, batch_size=2))
  alone = [
    _valid_tokens(data.load(dataclasses.replace(both, path=p), batch_size=2))
    for p in (f'{tmp_path}/a.jsonl.tokens', f'{tmp_path}/one.txt.tokens')
  ]
  assert tokens == alone[0] + alone[1]
  apart = dataclasses.replace(
    both,
    path=f'{tmp_path}/a.jsonl.tokens',
    valid_path=f'{tmp_path}/one.txt.tokens',
    valid_every=7,
  )
  found = bytes(_valid_tokens(data.load(apart, batch_size=2)))
  assert found.replace(b'\0', b'') == ''.join(TEXTS).encode()


def _valid_tokens(loaded):
  return [
    token
    for batch in loaded.valid
    for row, ids in zip(batch['tokens'], batch['segment_ids'], strict=True)
    for token in row[1:][ids[1:] > 0].tolist()
  ]


@pytest.mark.parametrize('where', ['ids', 'ends', 'index'])
def test_a_killed_run_continues(corpus, tmp_path, monkeypatch, where):
  config = _config(corpus, tokenizer='words.json')
  _write(config, tmp_path / 'whole', shard_bytes=3000)
  written = []
  replace = write_tokens.os.replace

  def killed(new, file):
    written.append(str(file))
    if where in str(file) and len(written) > 12:
      raise KeyboardInterrupt
    replace(new, file)

  monkeypatch.setattr(write_tokens.os, 'replace', killed)
  with pytest.raises(KeyboardInterrupt):
    _write(config, tmp_path, shard_bytes=3000)
  monkeypatch.undo()
  cached = dataclasses.replace(config, path=str(tmp_path / 'a.tokens'))
  with pytest.raises(ConfigError, match='has [23] of .* shards; run the comm'):
    data.load(cached, batch_size=2)
  done = token_cache.read_index(tmp_path / 'a.tokens').shards
  index, new = write_tokens.write(
    config, str(tmp_path / 'a.tokens'), shard_bytes=3000
  )
  assert new == len(index.shards) - len(done) > 0
  for file in (tmp_path / 'whole/a.tokens').glob('*.npy'):
    assert (tmp_path / 'a.tokens' / file.name).read_bytes() == file.read_bytes()
  _, new = write_tokens.write(
    config, str(tmp_path / 'a.tokens'), shard_bytes=3000
  )
  assert new == 0


@pytest.mark.in_turn
def test_processes_write_the_same(corpus, tmp_path):
  config = _config(corpus, tokenizer='words.json')
  _write(config, tmp_path / 'one', shard_bytes=5000)
  _write(config, tmp_path / 'two', shard_bytes=5000, workers=2)
  files = sorted((tmp_path / 'one/a.tokens').glob('*.npy'))
  assert len(files) > 9
  for file in files:
    other = tmp_path / 'two/a.tokens' / file.name
    assert other.read_bytes() == file.read_bytes()


def _cut(folder):
  file = folder / 'train-00001.ids.npy'
  file.write_bytes(file.read_bytes()[:-5])


def _other_array(folder):
  shutil.copy(folder / 'train-00000.ids.npy', folder / 'train-00001.ids.npy')


def _edit(**changes):
  def edit(folder):
    file = folder / 'index.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

  return edit


def _more_documents(folder):
  file = folder / 'train-00000.ends.npy'
  np.save(file, np.load(file) + 1)


DAMAGE = {
  'cut': (_cut, "train-00001.ids.npy' is missing or damaged .*; run the comm"),
  'missing': (
    lambda folder: (folder / 'train-00000.ends.npy').unlink(),
    "train-00000.ends.npy' is missing or damaged .*No such file",
  ),
  'empty': (
    lambda folder: (folder / 'train-00000.ids.npy').write_bytes(b''),
    "train-00000.ids.npy' is missing or damaged",
  ),
  'other_array': (_other_array, 'holds uint8 .*, and the index says'),
  'ends': (_more_documents, 'documents that do not add up to its tokens'),
  'version': (_edit(version=2), 'has the version 2 and this program reads 1'),
  'more_keys': (_edit(more=1), 'is no index of tokens'),
  'no_split': (_edit(train={}), 'is no index of tokens'),
  'no_records': (
    _edit(train={'records': 0, 'a_shard': 1}),
    'is no index of tokens .*records=0 must be',
  ),
  'no_tokenizer': (_edit(tokenizer={'name': 'bytes'}), 'is no index of tokens'),
  'no_json': (
    lambda folder: (folder / 'index.json').write_text('{"version'),
    'is no index of tokens .*; delete the folder',
  ),
  'no_index': (
    lambda folder: (folder / 'index.json').unlink(),
    r"index.json' cannot be read \(No such file",
  ),
}


@pytest.mark.parametrize('name', DAMAGE)
def test_damage_is_one_line(corpus, tmp_path, name):
  config, _ = _write(_config(corpus), tmp_path, shard_bytes=5000)
  damage, message = DAMAGE[name]
  damage(tmp_path / 'a.tokens')
  with pytest.raises(ConfigError, match=message) as caught:
    data.load(config, batch_size=2)
  assert '\n' not in str(caught.value)
  if name in ('cut', 'missing', 'empty', 'other_array'):  # and it is repaired
    write_tokens.write(
      _config(corpus), str(tmp_path / 'a.tokens'), shard_bytes=5000
    )
    data.load(config, batch_size=2)


def test_tokens_beyond_the_vocabulary(corpus, tmp_path):
  text = _config(corpus, tokenizer='words.json')
  config, _ = _write(text, tmp_path)
  file = tmp_path / 'a.tokens/valid-00000.ids.npy'
  np.save(file, np.load(file) + 100)
  with pytest.raises(ConfigError, match='ids.npy.* token 1.., beyond the 44'):
    list(data.load(config, batch_size=2).valid)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'tokenizer': 'bytes'}, "words.json', and 'bytes' is another; set"),
    ({'valid_every': 9}, "data.valid_every=9: '.*a.tokens' was split by 5"),
    ({'path': '/no/x.tokens'}, "data.path='/no/x.tokens': no such folder"),
    ({'label_key': 'label'}, "data.label_key='label': .*stores no labels"),
  ],
)
def test_configs_that_do_not_fit(corpus, tmp_path, changes, message):
  config, _ = _write(_config(corpus, tokenizer='words.json'), tmp_path)
  with pytest.raises(ConfigError, match=message):
    data.load(dataclasses.replace(config, **changes), batch_size=2)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'tokenizer': 'other.json'}, 'holds tokens of another tokenizer'),
    ({'files': 'one.txt'}, 'holds tokens of another text'),
    ({'valid_every': 9}, 'holds tokens of another valid_every: 5, and this'),
  ],
)
def test_a_folder_of_something_else_is_left_alone(
  corpus, tmp_path, changes, message
):
  _write(_config(corpus, tokenizer='words.json'), tmp_path)
  before = (tmp_path / 'a.tokens/index.json').read_bytes()
  config = _config(corpus, **{'tokenizer': 'words.json'} | changes)
  with pytest.raises(ConfigError, match=message):
    _write(config, tmp_path)
  assert (tmp_path / 'a.tokens/index.json').read_bytes() == before


def test_where_tokens_cannot_be_written(corpus, tmp_path):
  config = _config(corpus)
  with pytest.raises(ConfigError, match="--out='x' must end in .tokens"):
    write_tokens.write(config, 'x')
  (tmp_path / 'a.tokens').write_text('')
  with pytest.raises(ConfigError, match='is a file; name a folder'):
    _write(config, tmp_path)
  (tmp_path / 'b.tokens').mkdir()
  (tmp_path / 'b.tokens/other').write_text('')
  with pytest.raises(ConfigError, match='holds other files'):
    write_tokens.write(config, str(tmp_path / 'b.tokens'))
  mixture = {'a': {'path': config.path}}
  with pytest.raises(ConfigError, match='tokens of one text'):
    write_tokens.write(DataConfig(mixture=mixture), 'x.tokens')


def test_fingerprints_and_corruption_of_a_cache(corpus, tmp_path):
  text = _config(corpus)
  config, _ = _write(text, tmp_path)
  first = data.load(config, batch_size=2).fingerprint
  masked = dataclasses.replace(config, corruption='mask')
  assert next(iter(data.load(masked, batch_size=2).train))['weights'].any()
  copy = shutil.copytree(tmp_path / 'a.tokens', tmp_path / 'b.tokens')
  config = dataclasses.replace(config, path=str(copy))
  assert data.load(config, batch_size=2).fingerprint == first
  file = copy / 'train-00000.ids.npy'
  ids = np.load(file)
  ids[5] += 1
  np.save(file, ids)
  assert data.load(config, batch_size=2).fingerprint != first
