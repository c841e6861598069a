"""Reports as one file: HTML that needs no network, and the same as markdown.

A report is a title and a list of parts, each of which can write itself in both.
Plots are SVG inside the page; their ink takes the colour of the page's text, so
that they can be read on light and on dark ground.
"""

import dataclasses
import html
import io
import re
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.figure import Figure

INK = '#010203'  # of axes and letters, replaced by the colour of the text
COLORS = (
  '#4477aa', '#ee6677', '#228833', '#ccbb44', '#66ccee', '#aa3377', '#999999',
)  # fmt: skip
MARKERS = 'osD^vPX'

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --ground: #ffffff;
  --faint: #6a6a70; --line: #dcdce0; --good: #1a7f37; --bad: #c62828;
  --open: #8a6100; --box: #f5f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea;
  --ground: #17171a; --faint: #a0a0a8; --line: #3a3a40; --good: #57c477;
  --bad: #ff8a80; --open: #e3b341; --box: #222226; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem;
  color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
p, li { max-width: 46rem; }
.note { color: var(--faint); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { white-space: nowrap; color: var(--faint); font-weight: 600; }
td { min-width: 3rem; }
td.number, th.number { text-align: right; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); }
.open { color: var(--open); }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: var(--faint); font-size: .85rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--box);
  border-radius: .4rem; font-size: .8rem; }
a { color: inherit; }
"""


@dataclasses.dataclass(frozen=True)
class Heading:
  """A section begins."""

  text: str

  def html(self) -> str:
    """For the page."""
    return f'<h2 id="{anchor(self.text)}">{html.escape(self.text)}</h2>'

  def markdown(self) -> str:
    """For report.md."""
    return f'## {self.text}'


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
    return f'```\n{self.text}\n```'


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of cells; numbers stand to the right.

  Attributes:
    head: of the columns.
    rows: of str, int or float.
    kind: cell -> a class of the style sheet ('good', 'bad', 'open'), or ''.
  """

  head: Sequence[str]
  rows: Sequence[Sequence]
  kind: Callable[[str], str] = lambda cell: ''

  def html(self) -> str:
    """For the page."""
    right = [
      all(_is_number(row[i]) for row in self.rows if row[i] != '')
      for i in range(len(self.head))
    ]

    def cells(tag, row, kind=lambda cell: ''):
      for i, cell in enumerate(row):
        classes = ' '.join(filter(None, ('number' * right[i], kind(cell))))
        said = f' class="{classes}"' if classes else ''
        yield f'<{tag}{said}>{_inline(show(cell))}</{tag}>'

    head = ''.join(cells('th', self.head))
    body = ''.join(
      f'<tr>{"".join(cells("td", row, self.kind))}</tr>\n' for row in self.rows
    )
    return (
      f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
      f'<tbody>{body}</tbody></table></div>'
    )

  def markdown(self) -> str:
    """For report.md."""
    lines = [self.head, ['---'] * len(self.head), *self.rows]
    return '\n'.join(
      '| ' + ' | '.join(show(cell).replace('|', r'\|') for cell in line) + ' |'
      for line in lines
    )


@dataclasses.dataclass(frozen=True)
class Plot:
  """A figure of matplotlib, made by `figure()`."""

  figure: Figure
  caption: str

  def html(self) -> str:
    """For the page."""
    return (
      f'<figure>{svg(self.figure)}'
      f'<figcaption>{_inline(self.caption)}</figcaption></figure>'
    )

  def markdown(self) -> str:
    """For report.md."""
    return f'*{self.caption}* (a plot in report.html)'


def figure(width: float = 6.4, height: float = 4.0) -> tuple[Figure, object]:
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


def legend(axes, **options) -> None:
  """Adds a legend without a frame, in the colour of the text."""
  axes.legend(frameon=False, labelcolor=INK, fontsize='small', **options)


def svg(made: Figure) -> str:
  """Returns the figure as an SVG element, the same for the same figure."""
  text = io.StringIO()
  options = {'svg.fonttype': 'none', 'svg.hashsalt': 'report'}
  with matplotlib.rc_context(options):
    made.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
  element = text.getvalue()
  element = element[element.index('<svg') :]
  element = re.sub(r'<metadata>.*?</metadata>', '', element, flags=re.DOTALL)
  return element.replace(INK, 'currentColor')


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
  return '\n\n'.join([f'# {title}', *(p.markdown() for p in parts)]) + '\n'


def anchor(text: str) -> str:
  """Returns the id of a heading."""
  return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')


def show(cell) -> str:
  """Returns a cell as text; floats have four digits."""
  if isinstance(cell, float):
    return f'{cell:.4g}'
  if isinstance(cell, int):
    return f'{cell:,}'
  return str(cell)


def _is_number(cell) -> bool:
  return not isinstance(cell, str) or bool(re.match(r'^[-−+]?[\d.]', cell))


def _inline(text: str) -> str:
  """Escapes text and sets what stands in backticks as code."""
  return re.sub(r'`([^`]+)`', r'<code>\1</code>', html.escape(text))
