"""Config files and values: what is accepted means what it says."""

import dataclasses
import json
import math
from typing import Annotated

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from efficient_attn import config as configs
from efficient_attn import config_files, formats
from efficient_attn.config import ConfigError, LMConfig
from efficient_attn.layers.stack import Stack
from efficient_attn.values import Dtype, OneOf, Positive, Range, read_value

TINY = dict(model=dict(name='lm', d_model=16, num_heads=4))


def one_line(error):
  assert '\n' not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
  'kind, value, found',
  [
    (bool, 'false', False),
    (bool, 'True', True),
    (bool, np.bool_(True), True),
    (int, '8', 8),
    (int, np.int64(8), 8),
    (float, '1e-3', 1e-3),
    (float, 3, 3.0),
    (float, np.float32(0.5), 0.5),
    (str, '123', '123'),
    (str | None, 'None', 'None'),
    (int | None, 'None', None),
    (int | None, None, None),
    (tuple[str, ...], 'gla, attention', ('gla', 'attention')),
    (tuple[str, ...], 'gla,', ('gla',)),
    (tuple[int, ...], '0', (0,)),
    (tuple[int, ...], [1, 2], (1, 2)),
    (tuple[tuple[int, ...], ...], '((64, 4, 1),)', ((64, 4, 1),)),
    (Positive | tuple[Positive, ...], '(3, 4)', (3, 4)),
    (Dtype | None, 'bfloat16', 'bfloat16'),
  ],
)
def test_read(kind, value, found):
  got = read_value(kind, value, 'key')
  assert got == found and type(got) is type(found)


@pytest.mark.parametrize(
  'kind, value, message',
  [
    (bool, 1, 'key=1 is a int; it must be of type bool'),
    (bool, 'no', "key='no' is a str; it must be of type bool"),
    (int, True, 'key=True is a bool; it must be of type int'),
    (int, 1.5, 'key=1.5 is a float; it must be of type int'),
    (int, '1' * 5000, 'is a str; it must be of type int'),
    (float, 'abc', "key='abc' is a str; it must be of type float"),
    (float, '1e400', 'key=inf must be finite'),
    (float, math.nan, 'key=nan must be finite'),
    (str, 3, 'key=3 is a int; it must be of type str'),
    (Positive, 0, 'key=0 must be >= 1 and at most 2147483647'),
    (Positive, 10**30, 'key=1000000000000000000000000000000 must be >= 1'),
    pytest.param(
      Positive, 10**5000, 'an integer of 16610 bits must be >= 1', id='huge'
    ),
    (Positive | None, 0, 'key=0 must be >= 1'),
    (Positive | tuple[Positive, ...], (3, 0), r'key\[1\]=0 must be >= 1'),
    (Positive | tuple[Positive, ...], 'a', "key.*'a' is a str"),
    (Annotated[float, Range(0, 1, below=True)], 1.0, r'key=1.0 .* in \[0, 1\)'),
    (Annotated[str, OneOf(('pre', 'post'))], 'per', "did you mean 'pre'"),
    (Dtype, 'float23', "did you mean 'float32'"),
    (tuple[int, ...], {}, 'key={} is a dict; it must be of type tuple'),
  ],
)
def test_read_refuses(kind, value, message):
  with pytest.raises(ConfigError, match=message) as error:
    read_value(kind, value, 'key')
  one_line(error)


@pytest.mark.parametrize(
  'key, value',
  [
    ('steps', 0),
    ('seed', -1),
    ('batch_size', 10**30),
    ('ema', 7.0),
    ('eval_every', -3),
    ('eval_batches', -1),
    ('keep_checkpoints', 0),
    ('checkpoint_every', -1),
    ('skip_nonfinite', -1),
    ('cpu_devices', 10**6),
    ('optimizer.learning_rate', -1),
    ('optimizer.learning_rate', '1e400'),
    ('optimizer.warmup_steps', -1),
    ('optimizer.clip_norm', -2),
    ('optimizer.weight_decay', -0.1),
    ('loss.label_smoothing', 5.0),
    ('loss.z_loss', -1e-4),
    ('data.workers', -1),
    ('data.valid_every', 1),
    ('data.packing', 'sequences'),
    ('model.ffn_dim', -1),
    ('model.vocab_size', 0),
    ('model.dropout', 1.0),
    ('model.norm_position', 'middle'),
    ('model.dtype', 'float8'),
    ('model.pattern', ()),
    ('model.mixers', {'gla': 3}),
    ('model.mixers', {3: {}}),
  ],
)
def test_ranges(key, value):
  with pytest.raises(ConfigError, match=key.replace('.', r'\.')) as error:
    configs.resolve(configs.override(TINY, {key: value}))
  one_line(error)


def test_ranges_hold_for_classes_built_directly():
  with pytest.raises(ConfigError, match='model.patch_size=0'):
    configs.ViTConfig(patch_size=0)
  with pytest.raises(ConfigError, match='data.workers=-1'):
    configs.DataConfig(workers=-1)


def write(path, text):
  path.write_text(text)
  return str(path)


def test_a_config_imports_its_neighbour_and_takes_words(tmp_path):
  (tmp_path / 'shared_by_configs.py').write_text('STEPS = 7\n')
  path = write(
    tmp_path / 'mine.py',
    'import shared_by_configs\n'
    'from efficient_attn.config import words\n'
    'def get_config(arg=""):\n'
    '  found = words(arg, "tiny")\n'
    '  return dict(steps=shared_by_configs.STEPS, tiny="tiny" in found)\n',
  )
  assert config_files.load(path) == dict(steps=7, tiny=False)
  assert config_files.load(f'{path}:tiny') == dict(steps=7, tiny=True)
  with pytest.raises(ConfigError, match="'tinny' is unknown; did you mean"):
    config_files.load(f'{path}:tinny')


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('x.yaml', 'steps: 3', r'give a \.py file'),
    ('x.json', '[1]', 'is not the config of a run'),
    ('x.json', '{}', 'is not the config of a run'),
    ('x.json', '', 'is not JSON'),
    ('x.json', '[' * 10**5, 'is not JSON'),
    ('x.json', '{"model": {}, "format": 99}', f'reads up to {formats.FORMAT}'),
    ('x.json', '{"model": {}, "format": "a"}', f'reads up to {formats.FORMAT}'),
    ('x.py', '', r'has no get_config\(\)'),
    ('x.py', 'get_config = 3', r'has no get_config\(\)'),
    ('x.py', 'def get_config(): return 3', 'returned a int'),
    ('x.py:tiny', 'def get_config(): return {}', 'takes no :tiny'),
  ],
)
def test_files_that_are_no_config(tmp_path, name, text, message):
  write(tmp_path / name.partition(':')[0], text)
  with pytest.raises(ConfigError, match=message) as error:
    config_files.load(str(tmp_path / name))
  assert '\n' not in str(error.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
  write(tmp_path / 'quick.py', '')
  with pytest.raises(ConfigError, match="did you mean 'quick.py'"):
    config_files.load(str(tmp_path / 'quik.py'))


def test_a_bug_in_a_config_keeps_its_traceback(tmp_path):
  path = write(tmp_path / 'x.py', 'def get_config(): return [][0]')
  with pytest.raises(IndexError):
    config_files.load(path)


def test_a_folder_with_a_colon(tmp_path):
  folder = tmp_path / '2026-11-27_12:30'
  folder.mkdir()
  config_files.save(configs.resolve(TINY), folder / 'config.json')
  saved = config_files.load(str(folder / 'config.json'))
  assert configs.resolve(saved) == configs.resolve(TINY)
  write(folder / 'x.py', 'def get_config(arg=""): return dict(arg=arg)')
  assert config_files.load(f'{folder}/x.py:b') == dict(arg='b')


def test_saved_values_are_plain(tmp_path):
  values = ml_collections.ConfigDict(TINY)
  values.optimizer = dict(
    learning_rate=np.float32(0.5), options=dict(mu_dtype=jnp.bfloat16)
  )
  config = configs.resolve(values)
  config_files.save(config, tmp_path / 'config.json')
  stored = json.loads((tmp_path / 'config.json').read_text())
  assert stored['format'] == formats.FORMAT
  assert stored['optimizer']['options'] == {'mu_dtype': 'bfloat16'}
  again = configs.resolve(config_files.load(str(tmp_path / 'config.json')))
  assert again == config and dataclasses.asdict(again)['model']['name'] == 'lm'


def test_an_older_format_keeps_the_options_that_it_implied(
  tmp_path, monkeypatch, caplog
):
  implied = {'gla': dict(conv_width=4, expand_k=0.25)}
  monkeypatch.setattr(formats, 'IMPLIED', {formats.FORMAT: implied})
  config = configs.resolve(
    configs.override(
      TINY,
      {
        'model.pattern': ('gla', 'attention', 'gla:far'),
        'model.mixers': {'gla:far': {'conv_width': 2}},
      },
    )
  )
  file = tmp_path / 'config.json'
  config_files.save(config, file)
  assert configs.resolve(config_files.load(str(file))) == config
  stored = json.loads(file.read_text())
  for written in (0, formats.FORMAT - 1):
    file.write_text(json.dumps(stored | {'format': written}))
    found = config_files.load(str(file))['model']['mixers']
    assert found == {
      'gla': implied['gla'],
      'gla:far': dict(conv_width=2, expand_k=0.25),
    }
    config_files.load(str(file))
  older = (0, formats.FORMAT - 1)
  notes = [f'format {w}; as they were: gla:far, gla' for w in older]
  assert [r.message.partition(' is of ')[2] for r in caplog.records] == notes


def test_gelu_of_an_older_format_is_that_of_tanh(tmp_path):
  config = configs.resolve(configs.override(TINY, {'model.activation': 'gelu'}))
  file = tmp_path / 'config.json'
  config_files.save(config, file)
  stored = json.loads(file.read_text())
  for written, name in ((0, 'gelu_tanh'), (1, 'gelu_tanh'), (2, 'gelu')):
    file.write_text(json.dumps(stored | {'format': written}))
    assert config_files.load(str(file))['model']['activation'] == name
  stored['model']['activation'] = ['gelu']  # refused elsewhere
  file.write_text(json.dumps(stored | {'format': 1}))
  assert config_files.load(str(file))['model']['activation'] == ['gelu']


def test_words_of_an_older_format_are_those_of_today(tmp_path, caplog):
  config = configs.resolve(configs.override(TINY, {'model.mixers': {}}))
  file = tmp_path / 'config.json'
  config_files.save(config, file)
  stored = json.loads(file.read_text())
  stored['model'] |= {
    'pattern': ['sla', 'lambda:near', 'attention', 'neighborhood'],
    'mixers': {
      'sla': {'dwc_width': 4},
      'lambda:near': {'window': 5},
      'attention': {'rotary_base': 1e6, 't5_buckets': 8, 'gate': 'head'},
      'neighborhood': {'grid': [4, 4], 'window': 3},
    },
  }
  file.write_text(json.dumps(stored | {'format': 2}))
  found = config_files.load(str(file))['model']
  assert found['pattern'] == (
    'slab',
    'lambda_network:near',
    'attention',
    'neighborhood',
  )
  assert found['mixers'] == {
    'slab': {'dwc_width': 4},
    'lambda_network:near': {'window': 5},
    'attention': {
      'rotary': {'base': 1e6},
      't5': {'buckets': 8},
      'gate': 'head',
    },
    'neighborhood': {'window': 3},
  }
  assert len(caplog.records) == 1
  # A new config says the words of today.
  for name, word in (('sla', 'slab'), ('lambda', 'lambda_network')):
    with pytest.raises(ConfigError, match=f"is called '{word}' now"):
      Stack(LMConfig(pattern=(name,)), causal=False, rngs=nnx.Rngs(0))
