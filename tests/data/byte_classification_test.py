"""Bytes and their class: what is in the files, in the right split."""

import pathlib
import sysconfig

import pytest

from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data.tasks.byte_classification import PACKAGES
from tests.data.answered import golden, rows


def texts(**options):
  return DataConfig(
    name='byte_classification', options=options, valid_examples=100
  )


@pytest.fixture
def imdb(tmp_path):
  """A folder of twelve documents, short and long, a split and class."""
  for split in ('train', 'test'):
    for kind in ('neg', 'pos', 'unsup'):
      folder = tmp_path / split / kind
      folder.mkdir(parents=True)
      for i in range(12):
        text = f'{split} {kind} {i} é ' * (i + 1)
        (folder / f'{i}_7.txt').write_bytes(text.encode())
      (folder / 'urls.html').write_text('no document')
  return tmp_path


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A standard library whose modules repeat a byte, 20 of them a package."""
  for p, package in enumerate((*PACKAGES, 'json')):
    folder = tmp_path / package / 'test'
    folder.mkdir(parents=True)
    (folder / 'a.py').write_bytes(b'\0' * 1000)  # tests are left out
    for i in range(20):
      content = bytes([1 + 20 * p + i]) * 40
      (tmp_path / package / f'module_{i}.py').write_bytes(content)
  paths = {'stdlib': str(tmp_path)}
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: paths)


def test_documents_do_not_change(imdb):
  assert golden(texts(path=str(imdb), seq_len=64)) == 'c3d191e435c12706'


def test_windows_do_not_change(library):
  assert golden(texts(seq_len=32)) == '2d27bbeb7ef73821'


def test_documents_are_cut_behind_and_filled_in_front(imdb):
  config = texts(path=str(imdb), seq_len=30)
  train, valid = rows(config, batches=12)  # 5 epochs of 24 documents
  for split, found in (('train', train), ('test', valid)):
    wanted = []
    for label, kind in enumerate(('neg', 'pos')):
      for file in (imdb / split / kind).glob('*.txt'):
        text = file.read_bytes()
        wanted.append((b'\0' * (30 - len(text)) + text[:30], label))
    epochs = len(found) // 24
    assert sorted(found) == sorted(wanted * epochs) and len(wanted) == 24
    assert {label for _, label in found[:10]} == {0, 1}  # in no order


def test_windows_are_split_by_file(library):
  train, valid = rows(texts(seq_len=32), batches=30)
  for split in (train, valid):
    for text, label in split:
      assert {(byte - 1) // 20 for byte in text} == {label}
    share = [label for _, label in split].count(0) / len(split)
    assert 0.1 < share < 0.3
  files = [set(b''.join(text for text, _ in x)) for x in (train, valid)]
  assert not files[0] & files[1] and len(files[0]) > 2 * len(files[1])


def test_this_python_has_windows_of_every_class():
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  wanted = [
    b''.join(path.read_bytes() for path in sorted((root / name).rglob('*.py')))
    for name in PACKAGES
  ]
  train, valid = rows(texts(seq_len=100))
  inside = [text in wanted[label] for text, label in train + valid]
  assert sum(inside) > 0.9 * len(inside)  # the others go over two files
  assert {label for _, label in valid} == set(range(len(PACKAGES)))


def test_mistakes(imdb):
  def fails(match, **options):
    with pytest.raises(ConfigError, match=match):
      data.load(texts(**options), batch_size=2)

  fails('seq_len: at most so many', seq_len=10**7)
  fails('seq_len must be > 0', seq_len=0)
  fails("path='nowhere' has no train/neg/.*aclImdb", path='nowhere')
  for file in (imdb / 'test' / 'pos').iterdir():
    file.unlink()
  fails('has no test/pos/', path=str(imdb))


def test_documents_that_vanish_are_damaged_data(imdb):
  batches = iter(data.load(texts(path=str(imdb)), batch_size=4).train)
  next(batches)
  for file in imdb.rglob('*.txt'):
    file.unlink()
  state = batches.get_state()
  with pytest.raises(data.BadDataError, match='cannot be read: No such file'):
    next(batches)
  assert batches.get_state() == state
