"""Reports as one file: HTML that needs no network, and the same as markdown.

A report is a title and a list of parts, each of which can write itself in both.
Plots are SVG inside the page; their ink takes the colour of the page's text, so
that they can be read on light and on dark ground.
"""

import dataclasses
import html
import io
import itertools
import math
import pathlib
import re
import zlib
from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

INK = '#010203'  # of axes and letters, replaced by the colour of the text
# Three to one or more on white and on the dark ground below.
COLORS = (
  '#4a7fd1', '#e0525f', '#2f9e44', '#a8860a', '#b865c4', '#1a98b5', '#868686',
  '#c96a1b', '#8a4fd0', '#7c9416', '#e0409f', '#9c6b3f',
)  # fmt: skip
MARKERS = 'osD^vPX<>*ph'
DASHES = ('-', '--', ':', '-.')
LINK = re.compile(r'\[([^]]+)\]\((#[^)]*)\)')  # within the page
NUMBER = re.compile(  # with its spread and its unit
  r'[-−+±]?[\d.,]+(e[-+]?\d+)?( ± [\d.]+)?( ?[^\s\d]{1,5})?|-?inf|nan'
)

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --ground: #ffffff;
  --faint: #6a6a70; --line: #dcdce0; --good: #1a7f37; --bad: #c62828;
  --open: #8a6100; --other: #1a5fb4; --box: #f5f5f7; --more: #00000040; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea;
  --ground: #17171a; --faint: #a0a0a8; --line: #3a3a40; --good: #57c477;
  --bad: #ff8a80; --open: #e3b341; --other: #7ab4f5; --box: #222226;
  --more: #ffffff40; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--ground); overflow-wrap: break-word;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; line-height: 1.3; }
p, li { max-width: 46rem; }
.note { color: var(--faint); font-size: .85rem; }
/* A shadow at the right says that there is more to scroll to. */
.wide { margin: 1rem 0; overflow-x: auto; background:
  linear-gradient(var(--ground), var(--ground)) right / 1rem 100% no-repeat
  local, linear-gradient(to left, var(--more), transparent) right / .7rem 100%
  no-repeat scroll; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
th { vertical-align: bottom; color: var(--faint); font-weight: 600;
  line-height: 1.3; overflow-wrap: normal; }
th:first-child { white-space: nowrap; }
td { min-width: 3rem; white-space: nowrap; }
td.long { min-width: 10rem; white-space: normal; }
.number { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); }
.open { color: var(--open); } .other { color: var(--other); }
figure { display: inline-block; vertical-align: top; max-width: 100%;
  margin: 1rem 2rem 1rem 0; }
@media (max-width: 36rem) { figure { margin-right: 0; }
  /* On a phone a row of text is a card: no column is off the screen. */
  .text, .text tbody, .text tr, .text td { display: block; }
  .text thead { display: none; }
  .text tr { padding: .6rem 0; border-bottom: 1px solid var(--line); }
  .text td { padding: .1rem 0; border: 0; text-align: left;
    white-space: normal; }
  .text td:empty { display: none; }
  .text td::before { content: attr(data-of) ": "; color: var(--faint); } }
figure svg { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 31rem; color: var(--faint); font-size: .85rem; }
pre { padding: .8rem; background: var(--box); border-radius: .4rem;
  font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: inherit; text-underline-offset: .15em; }
"""


class Name(str):
  """Text that is shown as it is: no markup, on one line.

  Other text may have code in backticks and links within the page.
  """

  def __new__(cls, text: str):
    """Puts a space for line breaks and for what cannot be printed."""
    return super().__new__(
      cls, ''.join(c if c.isprintable() else ' ' for c in text)
    )


@dataclasses.dataclass(frozen=True)
class Heading:
  """A section begins."""

  text: str

  def html(self) -> str:
    """For the page."""
    return f'<h2 id="{anchor(self.text)}">{html.escape(self.text)}</h2>'

  def markdown(self) -> str:
    """For report.md."""
    return f'## {_markdown(self.text)}'


@dataclasses.dataclass(frozen=True)
class Text:
  """A paragraph."""

  text: str
  note: bool = False  # small print

  def html(self) -> str:
    """For the page."""
    kind = ' class="note"' if self.note else ''
    return f'<p{kind}>{_inline(self.text)}</p>'

  def markdown(self) -> str:
    """For report.md."""
    return self.text


@dataclasses.dataclass(frozen=True)
class Code:
  """A command or what one printed."""

  text: str

  def html(self) -> str:
    """For the page."""
    return f'<pre>{html.escape(self.text)}</pre>'

  def markdown(self) -> str:
    """For report.md."""
    fence = '```'
    while fence in self.text:
      fence += '`'
    return f'{fence}\n{self.text}\n{fence}'


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells; numbers stand to the right, long text has room.

  Attributes:
    head: of the columns.
    rows: of str, int or float.
    kind: cell -> a class of the style sheet ('good', 'bad', 'open', 'other'),
      or ''.
  """

  head: Sequence[str]
  rows: Sequence[Sequence]
  kind: Callable[[str], str] = lambda cell: ''

  def html(self) -> str:
    """For the page."""
    columns = [
      [LINK.sub(r'\1', str(cell)) for cell in column if cell != '']
      for column in zip(*self.rows, strict=True)
    ] or [[]] * len(self.head)
    layout = [
      'number'
      if all(NUMBER.fullmatch(cell) for cell in column)
      else 'long' * any(len(cell) > 24 for cell in column)
      for column in columns
    ]

    text = layout.count('long') > 1
    cards = ' class="text"' if text else ''

    def cells(tag, row, kind=lambda cell: ''):
      for i, cell in enumerate(row):
        classes = ' '.join(filter(None, (layout[i], kind(cell))))
        said = f' class="{classes}"' if classes else ''
        if text and tag == 'td' and self.head[i]:
          said += f' data-of="{html.escape(self.head[i])}"'
        yield f'<{tag}{said}>{_inline(cell)}</{tag}>'

    head = ''.join(cells('th', self.head))
    body = ''.join(
      f'<tr>{"".join(cells("td", row, self.kind))}</tr>\n' for row in self.rows
    )
    return (
      f'<div class="wide"><table{cards}>'
      f'<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )

  def markdown(self) -> str:
    """For report.md."""
    lines = [self.head, ['---'] * len(self.head), *self.rows]
    return '\n'.join(
      '| ' + ' | '.join(_markdown(cell, '|') for cell in line) + ' |'
      for line in lines
    )


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of matplotlib, made by `figure()`."""

  figure: Figure
  caption: str
  file: str = ''  # where report.md finds it

  def html(self) -> str:
    """For the page."""
    return (
      f'<figure>{svg(self.figure)}'
      f'<figcaption>{_inline(self.caption)}</figcaption></figure>'
    )

  def markdown(self) -> str:
    """For report.md."""
    return f'![{self.caption}]({self.file})'


def figure(width: float = 5.2, height: float = 3.4) -> tuple[Figure, object]:
  """Returns an empty figure, in inches, and its axes."""
  made = Figure(figsize=(width, height), layout='constrained')
  made.patch.set_alpha(0)
  axes = made.subplots()
  axes.patch.set_alpha(0)
  axes.grid(alpha=0.25, linewidth=0.6, color=INK)
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[:].set_color(INK)
  axes.tick_params(colors=INK, which='both')
  for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
    label.set_color(INK)
  return made, axes


def style(index: int) -> dict[str, str]:
  """Returns how the line of that number is drawn.

  The first twelve differ in colour and in marker; more are dashed, and no two
  have the same colour and marker.
  """
  rounds, i = divmod(index, len(COLORS))
  return dict(
    color=COLORS[i],
    marker=MARKERS[(i + rounds) % len(MARKERS)],
    linestyle=DASHES[rounds % len(DASHES)],
  )


def legend(axes, entries: Mapping[str, object]) -> None:
  """Adds a legend above the axes, where it hides nothing; call it last.

  Args:
    axes: of `figure()`.
    entries: what is drawn, by its name.
  """
  made, names = axes.figure, [Name(name) for name in entries]
  width = 38 + 5.4 * max(map(len, names), default=0)  # of an entry, in points
  columns = max(1, int(72 * made.get_figwidth() / width))
  rows = math.ceil(len(names) / columns)
  made.set_figheight(made.get_figheight() + 0.18 * rows)
  drawn = made.legend(
    list(entries.values()), [' '] * len(names), loc='outside upper left',
    ncols=columns, frameon=False, labelcolor=INK, fontsize=9, handlelength=1.6,
    columnspacing=1.2, labelspacing=0.3, borderpad=0.2,
  )  # fmt: skip
  # Matplotlib would read a name as mathematics, or leave it out for its `_`.
  for text, name in zip(drawn.get_texts(), names, strict=True):
    text.set_parse_math(False)
    text.set_text(name)


def curves(
  lines: Mapping[str, tuple[Sequence, Sequence]],
  x: str,
  y: str,
  caption: str,
  log: str = '',
) -> Plot:
  """Returns a plot of lines: by name the places and the heights of points.

  Axes named in `log`, of 'xy', are logarithmic: x in powers of two.
  """
  made, axes = figure()
  entries = {}
  for i, (name, (xs, ys)) in enumerate(lines.items()):
    (entries[name],) = axes.plot(xs, ys, **style(i))
  if 'x' in log:
    axes.set_xscale('log', base=2)
  if 'y' in log:
    axes.set_yscale('log')
  axes.set_xlabel(x)
  axes.set_ylabel(y)
  legend(axes, entries)
  return Plot(made, caption)


def svg(made: Figure) -> str:
  """Returns the figure as an SVG element, the same for the same figure."""
  text = io.StringIO()
  options = {'svg.fonttype': 'none', 'svg.hashsalt': 'report'}
  with matplotlib.rc_context(options):
    made.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
  element = text.getvalue()
  element = element[element.index('<svg') :]
  element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
  # Matplotlib names the parts of all figures alike; ids of a page are unique.
  key = f'p{zlib.crc32(element.encode()):08x}-'
  element = re.sub(r'( id="|href="#|url\(#)', rf'\g<1>{key}', element)
  return element.replace(INK, 'currentColor')


def write(folder: pathlib.Path, title: str, parts: Sequence) -> None:
  """Writes report.html, and report.md with its plots in `plots`."""
  (folder / 'plots').mkdir(parents=True, exist_ok=True)
  numbers = itertools.count(1)
  parts = [
    dataclasses.replace(part, file=f'plots/{next(numbers)}.png')
    if isinstance(part, Plot)
    else part
    for part in parts
  ]
  for part in parts:
    if isinstance(part, Plot):
      part.figure.savefig(folder / part.file, dpi=90, facecolor='white')
  (folder / 'report.html').write_text(page(title, parts))
  (folder / 'report.md').write_text(markdown(title, parts))


def page(title: str, parts: Sequence) -> str:
  """Returns the report as HTML."""
  body = '\n'.join(part.html() for part in parts)
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n'
    f'<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n'
  )


def markdown(title: str, parts: Sequence) -> str:
  """Returns the report as markdown."""
  return (
    '\n\n'.join([f'# {_markdown(title)}', *(p.markdown() for p in parts)])
    + '\n'
  )


def anchor(text: str) -> str:
  """Returns the id of a heading, as web pages of markdown have it."""
  return re.sub(r'[^\w\s-]', '', text.lower()).strip().replace(' ', '-')


def link(text: str, heading: str) -> str:
  """Returns text that leads to a heading of the same report."""
  return f'[{text}](#{anchor(heading)})'


def show(cell) -> str:
  """Returns a cell as text; floats have four digits."""
  if isinstance(cell, float):
    return f'{cell:.4g}'
  if isinstance(cell, int):
    return f'{cell:,}'
  return str(cell)


def _inline(cell) -> str:
  """Returns HTML: code in backticks and links, except in a `Name`."""
  text = html.escape(show(cell))
  if isinstance(cell, Name):
    return text
  text = re.sub(r'`([^`]+)`', r'<code>\1</code>', text)
  return LINK.sub(r'<a href="\2">\1</a>', text)


def _markdown(cell, special: str = '') -> str:
  """Returns markdown, with a backslash before `special` characters.

  In a `Name` all are special that can be; `_` is not inside of a word.
  """
  text = show(cell)
  if isinstance(cell, Name):
    return re.sub(r'([\\`*\[\]<>|$~&#]|\b_|_\b)', r'\\\1', text)
  return re.sub(f'([{special}])', r'\\\1', text) if special else text
