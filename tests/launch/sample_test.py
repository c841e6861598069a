"""sample.py says in one line what is wrong, and prints no other tokens."""

import functools
import re

import jax
import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.config import EncoderDecoderConfig, LMConfig
from tests.launch.scripts import sample


@functools.cache
def model_of(vocab_size=256, position='none'):
  config = LMConfig(
    d_model=8,
    num_heads=1,
    num_layers=1,
    vocab_size=vocab_size,
    position=position,
    max_len=8,
    ffn='none',
  )
  return models.init(config, jax.random.key(0))


@pytest.mark.parametrize(
  'flag,message',
  [
    ('--length=0', '--length=0 must be at least 1'),
    ('--num_samples=0', '--num_samples=0 must be at least 1'),
    ('--kv_budget=-4', '--kv_budget=-4 must be at least 1'),
    ('--kv_policy=h20', "--kv_policy='h20' is unknown; did you mean 'h2o'?"),
    ('--seed=-1', '--seed=-1 must be in [0, 2^32)'),
    ('--temperature=-1', 'temperature=-1.0 must be a number >= 0; 0 is greedy'),
    ('--temperature=nan', 'temperature=nan must be a number >= 0; 0 is greedy'),
    ('--temperature=inf', 'temperature=inf must be a number >= 0; 0 is greedy'),
    ('--top_k=-2', 'top_k=-2 must be >= 0; 0 keeps all tokens'),
    ('--top_p=0', 'top_p=0.0 must be in (0, 1]; 1 keeps all tokens'),
    ('--top_p=1.5', 'top_p=1.5 must be in (0, 1]; 1 keeps all tokens'),
    ('--top_p=nan', 'top_p=nan must be in (0, 1]; 1 keeps all tokens'),
    ('--prompt=', '--prompt is empty; give at least one token'),
    (
      '--draft=x --kv_policy=h2o',
      '--draft takes rejected tokens back, which --kv_policy cannot; drop one',
    ),
  ],
)
def test_mistakes_are_found_before_the_model_is_loaded(
  flag, message, monkeypatch, capsys
):
  said = sample(monkeypatch, capsys, None, *flag.split(' '))
  assert said == (2, '', f'error: {message}\n')


@pytest.mark.parametrize(
  'flags,model,message',
  [
    (['--top_k=257'], {}, 'top_k=257 is more than the 256 tokens of the .*'),
    (
      [],
      dict(position='learned'),
      'a prompt of 2 tokens and length=9 need 10 learned positions, but '
      'model.max_len=8; shorten them',
    ),
    (
      ['--prompt=a~'],
      dict(vocab_size=100),
      "--prompt='a~' has token 126, but model.vocab_size=100; .*",
    ),
  ],
)
def test_what_does_not_fit_the_model(
  flags, model, message, monkeypatch, capsys
):
  code, out, err = sample(monkeypatch, capsys, model_of(**model), *flags)
  assert (code, out) == (2, '')
  assert re.fullmatch(f'error: {message}\n', err), err


@pytest.mark.parametrize('name,data', [('vit', 'digits'), ('lm', 'mqar')])
def test_only_text_is_sampled(name, data, monkeypatch, capsys):
  code, out, err = sample(monkeypatch, capsys, None, name=name, data=data)
  assert (code, out) == (2, '')
  assert err.startswith(
    f"error: --workdir='x' is a {name} of data.name='{data}'"
  )
  assert err.count('\n') == 1


def test_tokens_past_the_tokenizer_are_not_drawn(monkeypatch, capsys):
  # Three of four tokens of the model are not bytes.
  code, out, err = sample(
    monkeypatch, capsys, model_of(1024), '--num_samples=8', '--top_p=1'
  )
  assert code == 0, err
  assert out.count('ab') >= 8


def test_a_prompt_may_be_any_bytes(monkeypatch, capsys):
  code, out, _ = sample(
    monkeypatch, capsys, model_of(), '--prompt=a\udcff', '--length=1'
  )
  assert code == 0 and out.startswith('a\ufffd')


def test_prompts_of_a_file_are_one_batch(tmp_path, monkeypatch, capsys):
  file = tmp_path / 'prompts.txt'
  file.write_text('def f(x):\n\na\nimport os\n')
  flags = ('--temperature=0', '--length=6')
  _, out, _ = sample(
    monkeypatch, capsys, model_of(), f'--prompts={file}', *flags
  )
  said = out.split('\n\n')[:3]
  for prompt, found in zip(('def f(x):', 'a', 'import os'), said, strict=True):
    _, alone, _ = sample(
      monkeypatch, capsys, model_of(), f'--prompt={prompt}', *flags
    )
    assert alone.startswith(found)


@functools.cache
def restorer():
  config = EncoderDecoderConfig(
    d_model=8, num_heads=1, num_layers=1, vocab_size=270, ffn='none'
  )
  return models.init(config, jax.random.key(0))


SPANS = dict(name='encoder_decoder', corruption='spans', seq_len=64)


@pytest.mark.in_turn
def test_the_prompt_of_spans_is_a_source(monkeypatch, capsys):
  """Sentinels are read and written as <0>, and the end token ends a sample."""

  def said(*flags):
    code, out, err = sample(monkeypatch, capsys, restorer(), *flags, **SPANS)
    assert code == 0, err
    return out.rpartition('\n\n')[0].split('\n\n')

  flags = ('--temperature=0', '--length=6')
  for prompt in ('a <0> b<1>', 'no sentinel'):
    (text,) = said(f'--prompt={prompt}', *flags)
    source = encoded(prompt)
    tokens = [0]
    for _ in range(6):
      logits, _ = restorer()(np.array([tokens]), np.array([source]))
      allowed = np.asarray(logits[0, -1])[:259]  # three sentinels
      tokens.append(int(allowed.argmax()))
    if 0 in tokens[1:]:
      tokens = tokens[: tokens.index(0, 1)]
    assert text == written(tokens[1:])
  texts = said('--num_samples=40', '--top_p=1', '--temperature=3')
  assert any(re.search('<[012]>', text) for text in texts)
  assert not any(re.search(r'<[3-9]>|<\d\d', text) for text in texts)


def encoded(text):
  parts = re.split('<([012])>', text)
  found = [*parts[0].encode()]
  for number, part in zip(parts[1::2], parts[2::2], strict=True):
    found += [256 + int(number), *part.encode()]
  return [*found, 0]


def written(tokens):
  text = b''.join(
    b'<%d>' % (t - 256) if t >= 256 else bytes([t]) for t in tokens
  )
  return text.decode(errors='replace')


def test_a_prompt_of_unknown_sentinels(monkeypatch, capsys):
  said = sample(monkeypatch, capsys, restorer(), '--prompt=a<3>', **SPANS)
  message = '<3> is no sentinel of the run, which has <0> to <2>'
  assert said == (2, '', f"error: --prompt='a<3>': {message}\n")


def test_a_stop_token_ends_a_sample(monkeypatch, capsys):
  _, out, _ = sample(monkeypatch, capsys, model_of(), '--temperature=0')
  whole = out.rpartition('\n\n')[0]
  stop = whole[4]
  _, out, _ = sample(
    monkeypatch, capsys, model_of(), '--temperature=0', f'--stop={stop}'
  )
  head, rest = whole[:2], whole[2:]
  assert out.rpartition('\n\n')[0] == head + rest[: rest.index(stop)]


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--prompts=nowhere'], "--prompts='nowhere': No such file or directory"),
    (['--prompts=empty'], "--prompts='empty' has no line with a prompt"),
    (['--stop=ab'], "--stop='ab' is 2 tokens; it has to be one"),
    (['--stop='], "--stop='' has no tokens; give another"),
  ],
)
def test_files_and_stops_that_make_no_sense(
  flags, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').write_text('\n\n')
  said = sample(monkeypatch, capsys, model_of(), *flags)
  assert said == (2, '', f'error: {message}\n')


def test_a_draft_changes_no_greedy_token(monkeypatch, capsys):
  """Here the model is its own draft: all it proposes is accepted."""
  flags = '--temperature=0', '--prompt=ab'
  _, plain, _ = sample(monkeypatch, capsys, model_of(), *flags)
  code, out, _ = sample(monkeypatch, capsys, model_of(), *flags, '--draft=x')
  count, _, drafted = out.partition('\n')
  assert not code and count == '[5.0 tokens a pass of the model]'
  assert drafted.splitlines()[0] == plain.splitlines()[0]
