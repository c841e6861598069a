r"""Tokenizes text once, into files that training maps into memory.

python launch/tokenize_text.py --out=code.tokens --path='code/*.jsonl' \
    --tokenizer=tokenizer.json
python launch/tokenize_text.py --out=code.tokens --config=configs/lm/mine.py

Run again, it continues. A config then reads it by data.path='code.tokens', with
the same data.tokenizer.
"""

import argparse


def main():
  """Reads the flags, tokenizes and says how much it was."""
  from efficient_attn import cli, config, config_files, data
  from efficient_attn.data import write_tokens

  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', required=True, help='a folder, x.tokens')
  parser.add_argument('--config', help='of which data.* is read')
  parser.add_argument('--path', help='data.path')
  parser.add_argument('--tokenizer', help='data.tokenizer')
  parser.add_argument(
    '--workers', type=int, default=cli.count_cores(), help='processes'
  )
  with cli.clear_errors():
    args, changes = cli.parse_changes(parser)
    if args.config is None and args.path is None:
      parser.error('--path or --config is required')
    if args.workers < 1:
      raise config.ConfigError(f'--workers={args.workers} must be at least 1')
    values = config_files.load(args.config) if args.config else {'model': {}}
    for key in ('path', 'tokenizer'):
      if getattr(args, key) is not None:
        changes[f'data.{key}'] = getattr(args, key)
    resolved = config.resolve(config.override(values, changes))
    if resolved.data.name != 'text':
      raise config.ConfigError(
        f'data.name={resolved.data.name!r} is no text, which can be tokenized'
      )
    index, new = write_tokens.write(
      data.complete(resolved.data), args.out, workers=args.workers
    )
  tokens, size = index.total('tokens'), index.total('bytes')
  done = 'is complete' if new else 'was complete already'
  print(
    f'{args.out} {done}: {index.total("documents"):,} documents, {tokens:,} '
    f'tokens, {size:,} bytes of text'
  )


if __name__ == '__main__':
  main()
