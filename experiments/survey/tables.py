"""The tables of the surveys, cell by cell: as printed, and as measured."""

from collections.abc import Mapping
from itertools import chain

from efficient_attn.layers.mixers import MIXERS
from efficient_attn.ops.softmax.sage_attention import RECIPES
from experiments import page
from experiments.survey import printed
from experiments.survey.claims.complexity import LENGTHS
from experiments.survey.sparse_counts import TOKENS
from experiments.survey.table_counts import (
  BUDGET,
  NOT_MEASURED,
  SHORT,
  decoding,
  in_form,
  stored,
  uses,
)

CLOSE = 0.2


def mark(text: str, agrees: bool) -> str:
  """A measured cell, and whether it is as printed.

  A cross is for what a method does, never for what is not built here.
  """
  return f'{text} {"✓" if agrees else "✗"}'


# Caches that keep all keys here, and in their papers do not.
WHOLE_HERE = {'moa', 'duo'}
GAP = 'not built here'


def kind(cell) -> str:
  """The class of a cell in the style sheet."""
  ends = {'✓': 'good', '✗': 'bad'}
  open_ = cell == NOT_MEASURED or str(cell).endswith(('not run', GAP))
  return ends.get(str(cell)[-1:], 'open' if open_ else '')


def value(claims: Mapping, claim: str, *keys: str):
  """A stored value, or the cell that says why there is none."""
  if claim not in claims:
    return f'{claim} not run'
  found = claims[claim]
  for key in keys:
    if key not in found:
      return NOT_MEASURED
    found = found[key]
  return found


def compared(found: float | str | list, costs: str, also: str = '') -> str:
  """The cell of counted exponents beside as many printed costs."""
  found = found if isinstance(found, list) else [found]
  for reason in found:
    if isinstance(reason, str):
      return reason
  text = ' or '.join(f'N^{abs(x):.2f}' for x in found) + also
  if not costs:
    return text
  wanted = [printed.EXPONENTS[c] for c in costs.split(' or ')]
  pairs = zip(found, wanted, strict=True)
  return mark(text, all(abs(x - e) < CLOSE for x, e in pairs))


def training(claims: Mapping, name: str, form: str, key: str, costs: str):
  """The cell of training in the printed forms, and in that of the row."""
  here = value(claims, 'R17', name, key)
  which, found = ('time', 'memory').index(key), []
  for part in form.split(' or '):
    apart = part in ('quadratic', 'sequential')
    found.append(in_form(name, part)[which] if apart else here)
  if not apart:
    return compared(found, costs)
  if not isinstance(here, str):
    here = f'N^{here:.2f}'
  return compared(found, costs, f', here {here}')


def few_bits(claims: Mapping) -> page.Table:
  """AS table 2."""
  rows = []
  for name, (phase, *formats) in printed.AS2.items():
    cells = [NOT_MEASURED, NOT_MEASURED]
    error = NOT_MEASURED
    if name in printed.EXACT:
      claim, key, limit = printed.EXACT[name]
      error = value(claims, claim, key)
      known = isinstance(error, float)
      cells = 2 * [mark('exact', error < limit) if known else error]
    elif name in printed.SAGE:
      recipe, key = printed.SAGE[name]
      recipe = RECIPES[recipe]
      cells = [
        mark(ours, ours == printed.FORMATS[theirs])
        for ours, theirs in zip(
          (recipe.logits, recipe.weights), formats, strict=True
        )
      ]
      error = value(claims, 'R11', key)
    elif name in printed.TWO_BITS:
      bits = value(claims, 'R12', 'bits')
      errors = [value(claims, 'R12', key) for key in printed.TWO_BITS[name]]
      cells = [
        f'{bits:.0f} bits with scales, error {e:.2f}'
        if isinstance(e, float)
        else e
        for e in errors
      ]
    if isinstance(error, float):
      error = f'{error:.2g}'
    pairs = chain(*zip(formats, cells, strict=True))
    rows.append([name, phase, *pairs, error])
  head = ['AS table 2', 'for', 'queries, keys', 'here', 'weights, values']
  head += ['here', 'error of the output']
  return page.Table(head, rows, kind=kind)


def flags(claims: Mapping) -> page.Table:
  """AS table 4; nothing in it needs a stored value."""
  del claims

  def able(said: str, can: bool) -> str:
    if can != (said == 'yes'):
      return 'yes' if can else NOT_MEASURED
    return mark(said, True)

  rows = []
  for name, (ours, text, less, video, free) in printed.AS4.items():
    decodes, sees, own = uses(ours)
    share = stored(ours)
    if share == 'all keys' or ours in WHOLE_HERE:
      whole = share if share == 'all keys' else f'{share:.2f}'
      share = mark(whole, True) if less == 'no' else f'{whole}, less {GAP}'
    elif not isinstance(share, str):
      share = mark(f'{share:.2f}', (share < 1) == (less == 'yes'))
    trained = f'{own:,}'
    if free != 'no' or own:
      trained = mark(trained, (own == 0) == (free == 'yes'))
    language, frames = able(text, decodes), able(video, sees)
    row = [name, ours, text, language, less, share]
    rows.append([*row, video, frames, free, trained])
  head = ['AS table 4', 'here', 'language', 'here', 'stores less']
  head += ['of the bytes', 'video', 'here', 'training-free', 'own parameters']
  return page.Table(head, rows, kind=kind)


def linear(title: str, rows: Mapping):
  """Makes one of AS tables 5-7."""
  head = [title, 'forget gate', 'here', 'select gate', 'here']
  head += ['training time', 'counted', 'training space', 'counted']
  head += ['form', 'here', 'decoding time', 'counted']
  head += ['decoding space', 'counted']

  def table(claims: Mapping) -> page.Table:
    made = []
    for name, row in rows.items():
      ours, gate, select, time, space, form, slow, state = row
      spec = MIXERS[ours]
      forms = ', '.join(spec.forms)
      lacks = [
        f for f in form.split(' or ') if printed.FORMS[f] not in spec.forms
      ]
      pairs = (
        (gate, mark(spec.gate, spec.gate == printed.GATES[gate])),
        (select, NOT_MEASURED),
        (time, training(claims, ours, form, 'time', time)),
        (space, training(claims, ours, form, 'memory', space)),
        (form, f'{forms}; {lacks[0]} {GAP}' if lacks else mark(forms, True)),
        (slow, compared(decoding(ours), slow)),
        (state, compared(value(claims, 'R17', ours, 'state'), state)),
      )
      made.append([name, *chain(*pairs)])
    return page.Table(head, made, kind=kind)

  return table


def patterns(claims: Mapping) -> page.Table:
  """FL table 4."""
  rows = []
  for name, (ours, costs) in printed.FL4.items():
    part = ''
    if name in printed.PAIRS:
      found = value(claims, 'R24', f'{printed.PAIRS[name]} exponent')
      part = f'pairs {compared(found, costs)}'
    elif name == 'Reformer':
      found = value(claims, 'R25', 'costs', 'hashing', 'exponent')
      part = f'hashing {compared(found, costs)}'
    time = compared(value(claims, 'R17', ours, 'time'), costs)
    rows.append([name, costs, time, part])
  head = ['FL table 4', 'cost', 'training time', 'of a part']
  return page.Table(head, rows, kind=kind)


def master(claims: Mapping) -> page.Table:
  """The master comparison of S003."""

  def percent(claim, key, name, base):
    """Of softmax attention: higher is better for accuracies, not for bits."""
    if not name:
      return NOT_MEASURED
    found, dense = (value(claims, claim, n, key) for n in (name, base))
    if isinstance(found, str):
      return found
    return f'{100 * (dense / found if claim == "R29" else found / dense):.1f} %'

  def alone(name):
    claim, task, row = printed.ALONE[name]
    found, dense = (
      value(claims, claim, task, n, 'mean') for n in (row, 'attention')
    )
    if isinstance(found, str):
      return found
    share = dense / found if task == 'text' else found / dense
    return f'{100 * share:.1f} %' + ' (images)' * (task == 'images')

  rows = []
  for name, (ours, time, memory, quality) in printed.S003.items():
    counts = [
      value(claims, 'R17', ours, key) for key in ('time', 'memory', 'state')
    ]
    if name == 'Standard':  # all logits, where our row goes by tiles
      counts[1] = value(claims, 'R07', 'reference slope')
    text, arena, recall = printed.TRAINED[name]
    pairs = zip(counts, (time, memory, memory), strict=True)
    counted, trained, decoded = (compared(*pair) for pair in pairs)
    costs = [name, time, counted, memory, trained, decoded]
    texts = percent('R29', 'mean', text, 'attention')
    qualities = [
      alone(name) if name in printed.ALONE else texts,
      percent('R30', 'average', arena, 'Transformer'),
      percent('R21', 'mean', recall, 'attention'),
    ]
    rows.append([*costs, quality, *qualities])
  head = ['S003, master comparison', 'time', 'counted', 'memory', 'training']
  head += ['decode state', 'quality', 'text', 'LRA', 'recall']
  return page.Table(head, rows, kind=kind)


LOG = printed.EXPONENTS['O(N log N)']
RULE = (
  f'Counted are exponents of N between {LENGTHS[0]:,} and {LENGTHS[1]:,} '
  'tokens on our rows (R17): operations and largest array of a training pass, '
  f'and the decode state. ✓ is within {CLOSE} of print: this tells N and '
  f'N log N, here N^{LOG:.2f}, from N sqrt N and N^2, not from each other.'
)
GATED = (
  f'{RULE} Quadratic and sequential forms are counted apart, as one chunk and '
  f'token by token, between {SHORT[0]:,} and {SHORT[1]:,} tokens.'
)
# By table: how it is made, and what is said under it.
TABLES = {
  'AS 2': (
    few_bits,
    'Errors are of outputs, relative: R07, R13, R14, and R11 with scales of '
    'whole tiles and, in 8 and 4 bits, weights in float16. Of KIVI and KVQuant '
    'they are of 2-bit keys and values of a trained model (R12).',
  ),
  'AS 4': (
    flags,
    f'Bytes of the decode state after {TOKENS:,} tokens with one kv head, over '
    f'those of attention; policies have a budget of {BUDGET:,}, and selectors '
    'return masks over all keys, which stay. MoA and DuoAttention keep whole '
    'caches here, which their papers do not. Own parameters are those that '
    'attention has not, at width 512; "~" is partly trained. What is possible '
    'here and not printed has no mark.',
  ),
  'AS 5': (linear('AS table 5', printed.AS5), GATED),
  'AS 6': (linear('AS table 6', printed.AS6), GATED),
  'AS 7': (
    linear('AS table 7', printed.AS7),
    f'{GATED} Decoding time is that of N tokens. Gates and forms are fields of '
    'the method table; I - beta k k^T is a product with a matrix (R16) and no '
    'gate there.',
  ),
  'FL 4': (
    patterns,
    f'{RULE} Of a part: pairs of the mask from 256 to 2,048 tokens (R24), and '
    'hashing by one matrix, as printed (R25).',
  ),
  'S003': (
    master,
    f'{RULE} Quality is in percent of softmax attention without a metric, so '
    'nothing can agree with it. Text: bits per byte of attention over its own '
    '(R29, R43), and accuracy on digits over that of attention (R51). LRA: '
    'average over that of the Transformer, from the published accuracies '
    '(R30; Longformer, Reformer). Recall: accuracy over that of attention '
    '(R21). Counts of KDA are of its own layers; the largest array of '
    'Linformer is its projection, made for the longest input.',
  ),
}


def tables(claims: Mapping[str, Mapping]) -> list:
  """Returns the tables of the surveys.

  Args:
    claims: the values of every claim that was measured, by its number.
  """
  parts = []
  for make, note in TABLES.values():
    parts += [make(claims), page.Text(note, note=True)]
  return parts
