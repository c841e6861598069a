"""Continues a prompt with a trained language model.

python launch/sample.py --workdir=runs/quickstart --prompt='def main('

With --prompts=file each line of a file is a prompt, and all are one batch. A
continuation ends where it says one of --stop.

A model of data.corruption='spans' restores what sentinels stand for: the prompt
is its source, the sample its target.

python launch/sample.py --workdir=runs/spans --prompt='def f(<0>):'

With --draft=runs/small another run proposes tokens, which this one accepts or
replaces: the samples are distributed as without.

With --kv_policy=h2o --kv_budget=64 each layer of softmax attention holds the
keys and values of 64 tokens, whatever the length.
"""

import argparse
import functools
import operator
import os
import pathlib
import re
import time

import jax
import numpy as np

from efficient_attn import cli
from efficient_attn.config import ConfigError, choose


def main():
  """Reads the flags, loads the run and prints its continuation."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True, help='of the trained run')
  parser.add_argument('--prompt', default='def ')
  parser.add_argument(
    '--prompts', default='', help='file with a prompt a line, in place of one'
  )
  parser.add_argument(
    '--stop', action='append', default=[], help='token that ends a sample'
  )
  parser.add_argument('--length', type=int, default=256, help='tokens to add')
  parser.add_argument('--num_samples', type=int, default=1)
  parser.add_argument(
    '--temperature', type=float, default=0.8, help='0: greedy'
  )
  parser.add_argument('--top_k', type=int, default=0, help='0 or -1: all')
  parser.add_argument('--top_p', type=float, default=0.95, help='1: all')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
    '--draft', default='', help='run of a smaller lm that proposes tokens'
  )
  parser.add_argument(
    '--kv_policy', default='', help='h2o, snapkv, tova, streaming_llm; off'
  )
  parser.add_argument(
    '--kv_budget', type=int, default=64, help='tokens that each cache holds'
  )
  args = parser.parse_args()
  with cli.clear_errors():
    check(args)
    print_samples(args)


def check(args: argparse.Namespace) -> None:
  """Checks what needs no model."""
  from efficient_attn.decode.eviction import POLICIES
  from efficient_attn.decode.sampling import check_options

  for name in ('length', 'num_samples', 'kv_budget'):
    value = getattr(args, name)
    if value < 1:
      raise ConfigError(f'--{name}={value} must be at least 1')
  if not 0 <= args.seed < 2**32:
    raise ConfigError(f'--seed={args.seed} must be in [0, 2^32)')
  check_options(args.temperature, args.top_k, args.top_p)
  if args.kv_policy:
    choose('--kv_policy', args.kv_policy, POLICIES)
  if args.draft and args.kv_policy:
    raise ConfigError(
      '--draft takes rejected tokens back, which --kv_policy cannot; drop one'
    )
  if not args.prompt:
    raise ConfigError('--prompt is empty; give at least one token')


def print_samples(args: argparse.Namespace) -> None:
  """Prints `args.num_samples` continuations of `args.prompt`."""
  from efficient_attn.data import load_tokenizer
  from efficient_attn.decode.eviction import evict
  from efficient_attn.decode.generate import generate, pad
  from efficient_attn.models.spec import KINDS
  from efficient_attn.train.load import load_model

  config, model = load_model(args.workdir)
  if not KINDS[config.model.name].generates or config.data.name != 'text':
    able = ' or '.join(name for name, kind in KINDS.items() if kind.generates)
    raise ConfigError(
      f'--workdir={args.workdir!r} is a {config.model.name} of '
      f'data.name={config.data.name!r}; only an {able} of text continues a '
      'prompt'
    )
  if args.kv_policy:
    try:
      model = evict(model, args.kv_policy, args.kv_budget)
    except NotImplementedError as e:
      raise ConfigError(f'--kv_policy={args.kv_policy}: {e}') from None
  tokenizer = load_tokenizer(config.data.tokenizer)
  spans = None
  if config.data.corruption == 'spans':
    spans = SpanTokens(config.data, tokenizer)

  def encode(flag, text):
    """Returns the tokens of a flag's text, of which the model knows all."""
    read = tokenizer if spans is None or flag == '--stop' else spans
    try:
      tokens = np.asarray(read.encode(os.fsencode(text)), np.int32)
    except ConfigError as e:
      raise ConfigError(f'{flag}={text!r}: {e}') from None
    if not len(tokens):
      raise ConfigError(f'{flag}={text!r} has no tokens; give another')
    if tokens.max() >= config.model.vocab_size:
      raise ConfigError(
        f'{flag}={text!r} has token {tokens.max()}, but '
        f'model.vocab_size={config.model.vocab_size}; is data.tokenizer='
        f'{config.data.tokenizer!r} the one of the run?'
      )
    return tokens

  texts, flag = [args.prompt], '--prompt'
  if args.prompts:
    texts, flag = read_lines(args.prompts), f'--prompts={args.prompts}: line'
  prompts = [encode(flag, text) for text in texts]
  stop = [encode('--stop', text) for text in args.stop]
  for text, tokens in zip(args.stop, stop, strict=True):
    if len(tokens) != 1:
      raise ConfigError(
        f'--stop={text!r} is {len(tokens)} tokens; it has to be one'
      )
  start = time.perf_counter()
  prompts = [prompt for prompt in prompts for _ in range(args.num_samples)]
  rows, lengths = pad(prompts)
  said = dict(prompt=rows, prompt_lengths=lengths)
  writer = tokenizer
  if spans is not None:
    real = np.arange(rows.shape[1]) >= rows.shape[1] - lengths[:, None]
    begin = np.full((len(rows), 1), spans.end, np.int32)
    said = dict(prompt=begin, source=rows, source_ids=real.astype(np.int32))
    stop, prompts, writer = [*stop, [spans.end]], [[]] * len(rows), spans
  decode = functools.partial(generate, model)
  if args.draft:
    decode = functools.partial(accepted, model, load_draft(args.draft, config))
  tokens = decode(
    key=jax.random.key(args.seed),
    length=args.length,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
    allowed=writer.known[: config.model.vocab_size],
    stop=tuple(int(token) for (token,) in stop),
    **said,
  )
  for prompt, row in zip(prompts, np.asarray(tokens), strict=True):
    ends = np.flatnonzero(np.isin(row, stop))
    row = row[: ends[0]] if len(ends) else row
    print(writer.decode([*prompt, *row]), end='\n\n')
  seconds = time.perf_counter() - start
  print(f'[{tokens.size} tokens in {seconds:.1f} s, compilation included]')


def load_draft(workdir: str, config):
  """Returns the model of a run that has the tokens of another."""
  from efficient_attn.train.load import load_model

  drafted, draft = load_model(workdir)
  for key in ('model.name', 'model.vocab_size', 'data.tokenizer'):
    ours, theirs = (operator.attrgetter(key)(of) for of in (config, drafted))
    if ours != theirs:
      raise ConfigError(
        f'--draft={workdir!r} has {key}={theirs!r} and --workdir {ours!r}; '
        'give a run of the same tokens'
      )
  return draft


def accepted(model, draft, **options):
  """Returns tokens that a draft proposed and the model accepted or drew."""
  from efficient_attn.decode.speculative import speculate

  if 'source' in options:
    raise ConfigError('--draft serves an lm, and the run has sources; drop it')
  try:
    tokens, counts = speculate(model, draft, **options)
  except NotImplementedError as e:
    raise ConfigError(f'--draft: {e}') from None
  passes = np.sum(counts.blocks)
  tokens_a_pass = 1 + np.sum(counts.accepted) / passes
  print(f'[{tokens_a_pass:.1f} tokens a pass of the model]')
  return tokens


class SpanTokens:
  """Text with the sentinels <0>, <1>, ... of data.corruption='spans'.

  Attributes:
    end: the token that ends sources, and begins and ends targets.
    known: [vocab] bool: the tokens that have a text.
  """

  def __init__(self, config, tokenizer):
    from efficient_attn.data.corruption import Spans

    size, first = Spans(config, tokenizer).vocab_size, tokenizer.vocab_size
    self._tokenizer, self._first = tokenizer, first
    self.end = size - 1 if tokenizer.eos_id is None else tokenizer.eos_id
    self._count = size - first - (tokenizer.eos_id is None)
    self.known = np.append(tokenizer.known, np.ones(size - first, bool))

  def encode(self, text: bytes) -> list[int]:
    """Returns the ids of a source, none for no text."""
    parts = re.split(rb'<(\d{1,6})>', text)
    ids = [*self._tokenizer.encode(parts[0])]
    for number, part in zip(parts[1::2], parts[2::2], strict=True):
      if int(number) >= self._count:
        raise ConfigError(
          f'<{int(number)}> is no sentinel of the run, which has <0> to '
          f'<{self._count - 1}>'
        )
      ids += [self._first + int(number), *self._tokenizer.encode(part)]
    return ids and [*ids, self.end]

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, with sentinels as they are written above."""
    sentinels = np.flatnonzero(np.asarray(ids) >= self._first)
    text, begin = '', 0
    for at in sentinels:
      text += self._tokenizer.decode(ids[begin:at])
      text += f'<{ids[at] - self._first}>'
      begin = at + 1
    return text + self._tokenizer.decode(ids[begin:])


def read_lines(path: str) -> list[bytes]:
  """Returns the lines of a file that are not empty."""
  try:
    lines = pathlib.Path(path).read_bytes().splitlines()
  except OSError as error:
    raise ConfigError(f'--prompts={path!r}: {error.strerror}') from None
  lines = [line for line in lines if line]
  if not lines:
    raise ConfigError(f'--prompts={path!r} has no line with a prompt')
  return lines


if __name__ == '__main__':
  main()
