import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from efficient_attn.config import ConfigError
from efficient_attn.data.tokenizer import load_tokenizer

TEXT = 'def héllo(): return "wörld — 世界"\n' * 20


def _byte_level(folder, special='<|endoftext|>'):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator(
    [TEXT],
    tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=[special] if isinstance(special, str) else special,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  model.save(str(folder / 'tokenizer.json'))
  return str(folder / 'tokenizer.json')


def test_bytes():
  tokenizer = load_tokenizer('bytes')
  ids = tokenizer.encode('é\x01')
  assert ids.tolist() == [0xC3, 0xA9, 1] and ids.dtype == np.int32
  assert tokenizer.encode(b'\xff').tolist() == [255]
  assert tokenizer.decode(ids) == 'é\x01'
  assert tokenizer.decode([0xC3]) == '\ufffd'
  assert (tokenizer.vocab_size, tokenizer.eos_id) == (256, 0)
  assert tokenizer.token_bytes.tolist() == [0] + [1] * 255


def test_byte_level(tmp_path):
  tokenizer = load_tokenizer(_byte_level(tmp_path))
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32 and len(ids) < len(TEXT)
  assert tokenizer.decode(ids) == TEXT
  np.testing.assert_array_equal(tokenizer.encode(TEXT.encode()), ids)
  assert tokenizer.vocab_size > ids.max()
  sized, sizes = tokenizer.encode_sized(TEXT)
  np.testing.assert_array_equal(sized, ids)
  assert sizes.sum() == len(TEXT.encode())
  assert tokenizer.eos_id == 0


def test_words_with_spaces_and_byte_fallback(tmp_path):
  model = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {'<0xE4>': 0, '<0xB8>': 1, '<0x96>': 2, '▁': 3, 'a': 4, '▁a': 5},
      [('▁', 'a')],
      byte_fallback=True,
    )
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  model.save(str(tmp_path / 'tokenizer.json'))
  tokenizer = load_tokenizer(str(tmp_path / 'tokenizer.json'))
  _, sizes = tokenizer.encode_sized('a 世')
  assert sizes.sum() == 5  # the first of its two spaces is not of the text
  assert tokenizer.eos_id is None


def test_end_token_of_the_configuration_beside_it(tmp_path):
  path = _byte_level(tmp_path, special='<stop>')
  assert load_tokenizer(path).eos_id is None
  configured = {'eos_token': {'content': '<stop>'}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(configured))
  assert load_tokenizer(path).eos_id == 0


def test_unknown_ids_are_not_decoded(tmp_path):
  gapped = tmp_path / 'tokenizer.json'
  tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'a': 0, 'b': 3}, unk_token='a')
  ).save(str(gapped))
  tokenizer = load_tokenizer(str(gapped))
  assert tokenizer.known.tolist() == [True, False, False, True]
  assert tokenizer.decode([0, 3]) == 'a b' and tokenizer.decode([]) == ''
  others = load_tokenizer('bytes')
  for ids in ([0, 1], [4]):
    with pytest.raises(ValueError, match=f'token {ids[-1]} is not in the'):
      tokenizer.decode(ids)
  for ids in ([65, 256], [-1]):
    with pytest.raises(ValueError, match=f'token {ids[-1]} is not in the'):
      others.decode(ids)


def test_mistakes_name_the_key(tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match='data.tokenizer=.*no such file'):
    load_tokenizer('gpt2')
  bad = tmp_path / 'tokenizer.json'
  bad.write_text('{}')
  with pytest.raises(ConfigError, match='is not a tokenizer.json'):
    load_tokenizer(str(bad))
  monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
  with pytest.raises(ConfigError, match=r"pip install 'efficient_attn\[hf\]'"):
    load_tokenizer(str(bad))


@pytest.mark.parametrize(
  'name', ['[EOS]', '<｜end▁of▁sentence｜>', '<EOS>', '<|eos|>', '<|eot_id|>']
)
def test_end_tokens_of_other_names(name, tmp_path):
  assert load_tokenizer(_byte_level(tmp_path, special=name)).eos_id == 0


def test_words_are_no_end_token(tmp_path):
  vocab = {'eos': 0, 'sep': 1, '<s>': 2, '[PAD]': 3, '</p>': 4}
  path = str(tmp_path / 'tokenizer.json')
  tokenizers.Tokenizer(models.WordLevel(vocab, '<s>')).save(path)
  assert load_tokenizer(path).eos_id is None


@pytest.mark.parametrize(
  'name, content, eos',
  [
    ('tokenizer_config', {'eos_token': '<stop>'}, 1),
    ('tokenizer_config', {'eos_token': {'content': '<stop>'}}, 1),
    ('tokenizer_config', {'eos_token': None}, 0),
    ('tokenizer_config', {'eos_token': '<absent>'}, 0),
    ('tokenizer_config', [1], 0),
    ('special_tokens_map', {'eos_token': {'content': '<stop>'}}, 1),
    ('generation_config', {'eos_token_id': 1}, 1),
    ('generation_config', {'eos_token_id': [999, 1, 0]}, 1),
    ('generation_config', {'eos_token_id': None}, 0),
  ],
)
def test_files_that_name_the_end_token(name, content, eos, tmp_path):
  path = _byte_level(tmp_path, special=['</s>', '<stop>'])
  (tmp_path / f'{name}.json').write_text(json.dumps(content))
  assert load_tokenizer(path).eos_id == eos


@pytest.mark.parametrize('content', [b'', b'{', b'\xff', b'[' * 10**5])
def test_broken_files_beside_it(content, tmp_path):
  path = _byte_level(tmp_path)
  (tmp_path / 'generation_config.json').write_bytes(content)
  with pytest.raises(ConfigError, match='generation_config.json.* is not JSON'):
    load_tokenizer(path)


@pytest.mark.parametrize(
  'vocab, message',
  [
    ({}, 'has 0 tokens'),
    ({'a': 0, 'b': 4_100_000_000}, 'ids up to 4100000000'),
    ({'a': 2**33}, 'is not a tokenizer.json'),
    ({'a': -1}, 'is not a tokenizer.json'),
  ],
)
def test_broken_vocabularies(vocab, message, tmp_path):
  path = tmp_path / 'tokenizer.json'
  tokenizers.Tokenizer(models.WordLevel({'a': 0}, 'a')).save(str(path))
  content = json.loads(path.read_text())
  content['model']['vocab'] = vocab
  path.write_text(json.dumps(content))
  with pytest.raises(ConfigError, match=message):
    load_tokenizer(str(path))


@pytest.mark.parametrize('content', [b'', b'null', b'\xff', b'{"model": "a'])
def test_broken_tokenizer_files(content, tmp_path):
  path = tmp_path / 'tokenizer.json'
  path.write_bytes(content)
  with pytest.raises(ConfigError, match='is not a tokenizer.json') as caught:
    load_tokenizer(str(path))
  assert '\n' not in str(caught.value)
  with pytest.raises(ConfigError, match='add /tokenizer.json'):
    load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_cannot_encode(tmp_path):
  path = str(tmp_path / 'tokenizer.json')
  tokenizers.Tokenizer(models.WordLevel({'a': 0}, '[UNK]')).save(path)
  with pytest.raises(ConfigError, match="cannot encode 'b'.*UNK"):
    load_tokenizer(path).encode('b')


WORDS = {
  '[UNK]': 0,
  'a': 1,
  'straße': 2,
  'the': 3,
  '##t': 4,
  'i': 5,
  '[SEP]': 6,
}
LOWER = normalizers.Sequence(
  [
    normalizers.NFKD(),
    normalizers.Lowercase(),
    normalizers.StripAccents(),
    normalizers.Strip(),
  ]
)
BERT = normalizers.BertNormalizer()
PIECES = [('<unk>', 0.0), ('▁', -2.0), ('▁the', -3.0), ('a', -3.0), ('é', -4.0)]
BYTES = {f'<0x{i:02X}>': i for i in range(256)}
# Of every kind: model, normalizer, pre-tokenizer.
KINDS = {
  'byte_level': (None, None, pre_tokenizers.ByteLevel()),
  'byte_level_nfc': (None, normalizers.NFC(), pre_tokenizers.ByteLevel()),
  'byte_level_lower': (None, LOWER, pre_tokenizers.ByteLevel()),
  'words': (
    models.WordLevel(WORDS, '[UNK]'),
    LOWER,
    pre_tokenizers.Whitespace(),
  ),
  'word_pieces': (
    models.WordPiece(WORDS, unk_token='[UNK]'),
    BERT,
    pre_tokenizers.BertPreTokenizer(),
  ),
  'unigram': (
    models.Unigram(PIECES, 0),
    normalizers.Sequence([normalizers.Nmt(), LOWER]),
    pre_tokenizers.Metaspace(),
  ),
  'byte_fallback': (
    models.BPE(BYTES | {'▁': 256, 'a': 257}, [], byte_fallback=True),
    normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    ),
    None,
  ),
  'drops_what_it_has_not': (models.BPE({'a': 0, 'b': 1}, []), None, None),
}


@pytest.fixture(scope='module')
def of_every_kind(tmp_path_factory):
  loaded = {}
  for name, (model, normalizer, pre_tokenizer) in KINDS.items():
    folder = tmp_path_factory.mktemp(name)
    path = _byte_level(folder)
    made = tokenizers.Tokenizer.from_file(path)
    if model is not None:
      made = tokenizers.Tokenizer(model)
      made.add_special_tokens(['<|endoftext|>'])
    if normalizer is not None:
      made.normalizer = normalizer
    if pre_tokenizer is not None:
      made.pre_tokenizer = pre_tokenizer
    made.save(path)
    loaded[name] = load_tokenizer(path)
  return loaded


TEXTS = st.lists(
  st.sampled_from(
    ['Straße ', 'THE', ' ', '\n', '世界', 'É', '<|endoftext|>', '🙂']
  )
  | st.text(max_size=5)
).map(''.join)


@settings(deadline=None, max_examples=60)
@given(text=TEXTS)
@pytest.mark.parametrize('name', KINDS)
def test_tokens_have_all_bytes_of_the_text(of_every_kind, name, text):
  tokenizer = of_every_kind[name]
  ids, sizes = tokenizer.encode_sized(text)
  np.testing.assert_array_equal(ids, tokenizer.encode(text))
  assert ids.shape == sizes.shape and sizes.dtype == np.int32
  assert (sizes >= 0).all()
  assert sizes.sum() == (len(text.encode()) if len(ids) else 0)


def test_each_token_has_its_own_bytes(of_every_kind):
  _, sizes = of_every_kind['words'].encode_sized('  The straße, ÉÉ <unknown>\n')
  assert sizes.tolist() == [5, 8, 1, 5, 2, 7, 2]
