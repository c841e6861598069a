"""Studies: what is planned, resumed, matched and reported."""

import argparse
import dataclasses
import math
import re

import numpy as np
import pytest

from efficient_attn import models
from efficient_attn.config import ConfigError
from experiments import page
from experiments.ablations import harness, match, records, report, study
from experiments.ablations.match import matched, sizes
from experiments.folder import only_writer
from launch import ablate

STUDY = """
def get_config(arg=''):
  return dict(
    model=dict(name='lm', d_model=32, num_layers=1, num_heads=2, vocab_size=16,
               ffn='none'),
    data=dict(name='compression', valid_examples=8),
    steps=4, batch_size=4)

def sweep(arg=''):
  return dict(
    title='A study',
    architectures={
      'attention': {'model.pattern': ('attention',)},
      'gla': {'model.pattern': ('gla',)},
    },
    tasks={'short': {'data.options': dict(seq_len=8)}, 'long': {}},
    tests={'same': {}, 'longer': dict(seq_len=40)},
    learning_rates=(1e-3, 1e-2),
    seeds=(0, 1),
    match='params',
    published={'short': {'gla': 0.5}},
    band=0.1,
    source='nowhere',
  )
"""


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  file = tmp_path_factory.mktemp('study') / 'study.py'
  file.write_text(STUDY)
  return str(file)


def call(config, out=None, **changes):
  args = argparse.Namespace(config=config, out=out, dry_run=out is None)
  ablate.run(args, changes, 'the command')


@pytest.mark.in_turn
def test_a_study_runs_resumes_and_reports(
  config, tmp_path, capsys, monkeypatch
):
  plans = list(harness.plan(*study.load(config, {})))
  monkeypatch.setattr(harness, 'plan', lambda *_: plans)
  call(config, tmp_path)
  wanted = list(records.read(tmp_path).values())
  assert [(r['task'], r['architecture']) for r in wanted] == [
    (task, name) for task in ('short', 'long') for name in ('attention', 'gla')
  ]
  for record in wanted:
    assert len(record['runs']) == 4 and len(record['runs'][0]['losses']) == 4
    assert set(record['runs'][0]['tests']) == {'same', 'longer'}
  params = [record['sizes']['params'] for record in wanted]
  assert max(params) < 1.25 * min(params)
  html = (tmp_path / 'report.html').read_text()
  assert html.count('<svg') == 4 and 'src=' not in html
  assert not re.search(r'https?://(?!www\.w3\.org)', html)
  assert 'within band' in (tmp_path / 'report.md').read_text()

  # One program is lost and one half written; only those run again.
  lines = (tmp_path / 'results.jsonl').read_text().splitlines()
  (tmp_path / 'results.jsonl').write_text(
    '\n'.join([lines[0], lines[2], lines[3][:100]])
  )
  for missing in (2, 0):
    capsys.readouterr()
    call(config, tmp_path)
    assert capsys.readouterr().out.count('done before') == 4 - missing
  again = records.read(tmp_path)
  for record in wanted:
    assert again[record['key']]['runs'] == record['runs']

  with only_writer(tmp_path):
    with pytest.raises(ConfigError, match='another process'):
      call(config, tmp_path)


def test_dry_run_writes_nothing(config, capsys):
  call(config, **{'sweep.seeds': '0'})
  said = capsys.readouterr().out
  assert '4 programs' in said and 'short/gla' in said and '2 runs' in said


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'seed': '1'}, "did you mean 'seeds'"),
    (
      {'match': 'param'},
      "sweep.match='param' is unknown; did you mean 'params'",
    ),
    ({'seeds': '-1'}, r'sweep.seeds\[0\]=-1 must be in \[0, '),
    ({'seeds': '0,1,0'}, r'sweep.seeds=\(0, 1, 0\) must be one .* each once'),
    ({'seeds': '()'}, r'sweep.seeds=\(\) must be one value or more'),
    ({'learning_rates': '()'}, r'sweep.learning_rates=\(\) must be one'),
    ({'learning_rates': '0.1,-0.1'}, r'learning_rates\[1\]=-0.1 must be > 0'),
    ({'learning_rates': '0'}, r'learning_rates\[0\]=0.0 must be > 0'),
    ({'learning_rates': '0.001,1e-3'}, 'each once'),
    ({'weight_decays': '-0.1'}, r'weight_decays\[0\]=-0.1 must be >= 0'),
    ({'architectures': '{}'}, 'sweep.architectures={} is empty'),
    ({'tasks': '{}'}, 'sweep.tasks={} is empty'),
    ({'tests': '{}'}, 'sweep.tests={} is empty'),
    ({'architectures': {'a': 3}}, "sweep.architectures: 'a' is 3; it must be"),
    ({'architectures': {3: {}}}, 'sweep.architectures has the key 3'),
    ({'published': {'a': {'b': 'c'}}}, "sweep.published.a.b='c' is a str"),
    ({'band': '-1'}, 'sweep.band=-1.0 must be >= 0'),
  ],
  ids=str,
)
def test_mistakes_are_one_line(changes, message, config):
  changes = {f'sweep.{key}': value for key, value in changes.items()}
  with pytest.raises(ConfigError, match=message) as error:
    study.load(config, changes)
  assert '\n' not in str(error.value)


def test_a_run_is_no_study():
  with pytest.raises(ConfigError, match='has no sweep'):
    study.load('configs/lm/quickstart.py', {})


@pytest.mark.parametrize(
  'changes,message',
  [
    (
      {'sweep.metric': 'acuracy'},
      "short/attention: sweep.metric='acuracy' is unknown; did you mean 'accu",
    ),
    (
      {'sweep.metric': 'bits_per_byte'},
      'valid: accuracy, loss, macro_accuracy',
    ),
    # What only the last architecture, task or test has.
    (
      {'sweep.architectures.gla': {'model.pattern': ('glaa',)}},
      "^short/gla: .*'glaa' is unknown; did you mean 'gla'",
    ),
    (
      {'sweep.tasks.long': {'model.d_mode': 3}},
      '^long/attention: model.d_mode',
    ),
    (
      {'sweep.tests.longer': dict(seq_lenn=3)},
      "data.valid_options.seq_lenn=3 .*did you mean 'seq_len'",
    ),
    ({'data.valid_examples': '0'}, 'data.valid_examples=0 must be >= 1'),
    ({'optimizer.warmup_steps': '4'}, 'optimizer.warmup_steps=4 must be'),
    ({'model.vocab_size': '8'}, 'model.vocab_size=8 is below the'),
    (
      {'model.name': 'auto_encoder', 'sweep.match': 'state'},
      "sweep.match='state': the first architecture has no state",
    ),
  ],
  ids=str,
)
def test_all_programs_are_checked_before_the_first_trains(
  changes, message, config, tmp_path
):
  with pytest.raises(ConfigError, match=message) as error:
    call(config, tmp_path / 'out', **changes)
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'out').exists()


def of_gla(config):
  values, studied = study.load(config, {})
  return next(
    p.config for p in study.programs(values, studied) if p.architecture == 'gla'
  )


@pytest.mark.in_turn
def test_sizes_are_counted_and_matched(config):
  config = of_gla(config)
  batch = harness.first_batch(config)
  counted = sizes(config, batch)
  for quantity, times in (('params', 9), ('flops', 5)):
    first = {quantity: times * counted[quantity]}
    found = matched(config, batch, quantity, first)
    ratio = match.count(found, batch, quantity) / counted[quantity]
    assert ratio == pytest.approx(times, rel=0.1)  # no ffn: by width alone
    assert found.model.d_model % (2 * found.model.num_heads) == 0
  with pytest.raises(ConfigError, match='the nearest to'):
    matched(config, batch, 'params', {'params': 10})


@pytest.mark.in_turn
def test_the_ffn_brings_parameters_within_two_percent(config):
  plain = of_gla(config)
  config = dataclasses.replace(
    plain, model=dataclasses.replace(plain.model, ffn='glu')
  )
  batch = harness.first_batch(config)
  counted = sizes(config, batch)
  for times in (0.9, 1.12, 1.7):
    first = {'params': round(times * counted['params'])}
    found = matched(config, batch, 'params', first)
    assert found.model.d_model == config.model.d_model
    assert match.count(found, batch, 'params') == pytest.approx(
      first['params'], rel=0.02
    )
  # Nothing changes where nothing has to.
  assert matched(config, batch, 'params', counted) == config


@pytest.mark.in_turn
def test_equal_state_has_equal_parameters_too(config):
  plain = of_gla(config)
  config = dataclasses.replace(
    plain,
    model=dataclasses.replace(
      plain.model, ffn='glu', d_model=64, num_heads=4, mixers={}
    ),
  )
  batch = harness.first_batch(config)
  counted = sizes(config, batch)
  first = dict(state=4 * counted['state'], params=1.05 * counted['params'])
  found = matched(config, batch, 'state', first)
  assert found.model.num_heads == 1 and found.model.d_model == 64
  again = sizes(found, batch)
  for quantity, wanted in first.items():
    assert again[quantity] == pytest.approx(wanted, rel=0.02), quantity


def test_the_nearest_width_is_matched(config, monkeypatch):
  program = next(study.programs(*study.load(config, {})))
  monkeypatch.setattr(
    match, 'count', lambda config, batch, quantity: config.model.d_model**2
  )

  def width(target):
    found = matched(program.config, {}, 'params', {'params': target})
    return found.model.d_model

  # Widths are multiples of 4: 36^2 = 1296, 40^2 = 1600, 44^2 = 1936.
  for target, wanted in ((1297, 36), (1439, 36), (1441, 40), (1759, 40)):
    assert width(target) == wanted, target
  assert width(13) == 4
  for target in (12.7, 0.1, 10**9):  # 16 / 12.7 > 1.25
    with pytest.raises(ConfigError, match='the nearest to'):
      width(target)


def test_state_of_attention_grows_with_the_length():
  values = dict(
    model=dict(name='lm', d_model=16, num_layers=2, num_heads=2, vocab_size=16),
    data=dict(name='compression'),
  )
  from efficient_attn import config as configs

  found = []
  for length in (32, 64):
    changed = configs.override(values, {'data.options': dict(seq_len=length)})
    resolved = configs.resolve(changed)
    found.append(sizes(resolved, harness.first_batch(resolved))['state'])
  # Two layers, keys and values of 16 channels, 4 bytes.
  assert found == [2 * 2 * 16 * 4 * 32, 2 * 2 * 16 * 4 * 64]


def record_of(*scores, name='a', metric='accuracy'):
  """A record of runs (learning rate, weight decay, scores by seed)."""
  runs = [
    dict(
      learning_rate=rate,
      weight_decay=decay,
      seed=seed,
      skipped_steps=0,
      tests={'x': {metric: value}, 'y': {metric: value}},
      losses=[2.0, 1.0],
    )
    for rate, decay, values in scores
    for seed, value in enumerate(values)
  ]
  return dict(
    task='',
    architecture=name,
    runs=runs,
    seconds=1.0,
    sizes=dict(params=1, state=2, flops=3.0),
    machine=harness.machine(),
    config=dict(steps=2),
  )


@pytest.mark.parametrize(
  'metric,rate,decay',
  [
    ('accuracy', 0.2, 0.0),
    ('macro_accuracy', 0.2, 0.0),
    ('loss', 0.1, 0.0),
    ('bits_per_byte', 0.1, 0.0),
  ],
)
def test_the_best_pair_is_chosen(metric, rate, decay):
  record = record_of(
    (0.3, 0.0, [math.nan, 0.99]),
    (0.1, 0.0, [0.1, 0.3]),
    (0.2, 0.1, [0.9, 0.2]),  # the best run, not the best mean
    (0.2, 0.0, [0.6, 0.7]),
    (0.1, 0.1, [0.3, 0.3]),
    metric=metric,
  )
  found = report.best_runs(record, metric)
  pairs = {(run['learning_rate'], run['weight_decay']) for run in found}
  assert pairs == {(rate, decay)} and [run['seed'] for run in found] == [0, 1]


def test_the_best_pair_of_one_test():
  record = record_of((0.1, 0.0, [0.5]), (0.2, 0.0, [0.4]))
  record['runs'][1]['tests']['x']['accuracy'] = 0.55
  (best,) = report.best_runs(record, 'accuracy')
  (best_of_x,) = report.best_runs(record, 'accuracy', 'x')
  assert (best['learning_rate'], best_of_x['learning_rate']) == (0.1, 0.2)
  assert report.score(best_of_x, 'accuracy') == pytest.approx(0.475)


NAMES = (
  'gla $x^{$', '$', r'a\$b$c$', '_private', 'a|b', '<b>x</b> & ', '`code`',
  '[x](#y)', 'two\nlines\x1b[0m\0', '__init__', 'yes', '16', '*', '~~x~~', '#',
)  # fmt: skip


def test_names_are_text(tmp_path):
  studied = study.Study(
    title='<i>$x^{$ | _a_',
    architectures=dict.fromkeys(NAMES, {}),
    tasks={name: {} for name in NAMES},
    tests={name: {} for name in NAMES},
    published={NAMES[0]: {'yes': 0.5}},
  )
  found = [
    record_of((0.1, 0.0, [0.5, 0.6]), name=name) | dict(task=NAMES[0])
    for name in NAMES
  ]
  for record in found:
    for run in record['runs']:
      run['tests'] = {name: {'accuracy': 0.5} for name in NAMES}
  report.write(studied, found, 'a `command`', tmp_path)
  html = (tmp_path / 'report.html').read_text()
  shown = [page.Name(name) for name in NAMES]
  assert '\n' not in ''.join(shown) and '\0' not in html
  cells = re.findall(r'<tr><td[^>]*>(.*?)</td>', html)
  assert list(map(html_text, cells)) == shown
  assert 'class="good">yes</td>' not in html.split('</td>')[0]
  # Every plot has every name, as letters.
  for svg in re.findall(r'<svg.*?</svg>', html, re.DOTALL):
    letters = [
      html_text(text) for text in re.findall(r'<text[^>]*>(.*?)</text>', svg)
    ]
    assert set(shown) <= set(letters)
  lines = (tmp_path / 'report.md').read_text().splitlines()
  (start,) = (i for i, line in enumerate(lines) if line.startswith('| mixer'))
  rows = lines[start : start + 2 + len(NAMES)]
  assert lines[0] == r'# \<i\>\$x^{\$ \| \_a\_'
  assert len({len(re.findall(r'(?<!\\)\|', row)) for row in rows}) == 1
  assert '| gla \\$x^{\\$ |' in rows[2] and r'| a\|b |' in '\n'.join(rows)


def html_text(text):
  import html

  assert '<' not in text
  return html.unescape(text)


def test_names_within_words_stay_as_they_are():
  table = page.Table(['x'], [[page.Name('3 gated_deltanet : 1 mamba2')]])
  assert '| 3 gated_deltanet : 1 mamba2 |' in table.markdown()


def test_losses_are_thinned_by_means():
  losses = np.arange(7.0)
  assert harness._thinned(losses, 3) == [0.5, 2.5, 5.0]
  assert harness._thinned(losses, 100) == list(losses)
  assert len(harness._thinned(np.arange(1001.0))) == 100
  assert harness._thinned(np.arange(1000.0))[1] == 14.5
  assert harness._thinned(np.array([1.234567])) == [1.2346]


def test_runs_at_once_fill_half_of_the_memory(config, monkeypatch):
  program = next(study.programs(*study.load(config, {})))
  memory = [0]
  monkeypatch.setattr(harness, 'memory_available', lambda: memory[0])
  assert harness.runs_at_once(program.config) == 1
  memory[0] = 10**9
  once = harness.runs_at_once(program.config)
  # A run has its parameters and two moments, and computes gradients.
  params = models.parameter_count(program.config.model)
  assert 1 < once < 0.5 * memory[0] / (4 * 4 * params)
  memory[0] *= 3
  assert abs(harness.runs_at_once(program.config) - 3 * once) <= 3


def test_intervals():
  mean, half = report.interval([1.0, 2.0, 3.0])
  assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
  assert math.isnan(report.interval([1.0])[1])
  rng = np.random.default_rng(0)
  covered = [
    abs(mean) <= half
    for mean, half in (
      report.interval(list(rng.standard_normal(3))) for _ in range(2000)
    )
  ]
  assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_the_interval_of_an_accuracy_stays_within_0_and_1():
  scores = [0.9, 0.95, 1.0]
  mean, half = report.interval(scores)
  assert mean + half > 1
  assert report.bounds(scores, 'accuracy') == (mean, mean - half, 1.0)
  low = [1 - score for score in scores]
  assert report.bounds(low, 'macro_accuracy')[1] == 0.0
  assert report.bounds(scores, 'bits_per_byte')[2] == mean + half
  assert all(map(math.isnan, report.bounds([1.0], 'accuracy')[1:]))


@pytest.mark.parametrize('best,edge', [(0.1, True), (0.2, False), (0.3, True)])
def test_a_best_rate_at_an_edge_of_the_grid_is_told(best, edge, tmp_path):
  pairs = [(rate, 0.0, [0.9 if rate == best else 0.5]) for rate in RATES]
  record = record_of(*pairs, name='row')
  assert report.at_edge(record, 'accuracy') == edge
  assert report.at_edge(record_of((0.1, 0.0, [0.5])), 'accuracy')
  studied = study.Study(
    title='x', architectures={'row': {}}, learning_rates=RATES
  )
  report.write(studied, [record], 'a command', tmp_path)
  said = (tmp_path / 'report.md').read_text()
  assert ('at an edge of the grid' in said) == edge
  assert (f'| {best:g} | {"edge" if edge else ""} |' in said) is True


RATES = (0.1, 0.2, 0.3)


def with_sizes(name, pattern=(), **sizes):
  record = record_of((0.1, 0.0, [0.5, 0.6]), name=name)
  record['sizes'] |= sizes
  record['config']['model'] = dict(pattern=pattern)
  return record


def test_one_line_joins_the_sizes_of_one_model():
  rows = [
    ('mamba', 'mamba'), ('mamba2', 'mamba2'), ('rwkv4', 'rwkv4'),
    ('rwkv7', 'rwkv7'), ('rwkv-5', 'rwkv5'), ('rwkv-6', 'rwkv6'),
    ('gla 16', 'gla'), ('gla 32', 'gla'), ('gla 3 16', 'other'),
    ('deltanet negative', 'deltanet'), ('deltanet positive', 'deltanet'),
  ]  # fmt: skip
  found = report.families([with_sizes(name, (mixer,)) for name, mixer in rows])
  joined = {
    line: [record['architecture'] for record in group]
    for line, group in found.items()
  }
  assert joined.pop('gla') == ['gla 16', 'gla 32']
  assert joined == {
    name: [name] for name, _ in rows if name not in ('gla 16', 'gla 32')
  }


def test_sizes_are_told_apart_from_the_first(tmp_path):
  records = [
    with_sizes('a', params=1000, flops=2e9, state=64),
    with_sizes('b', params=1120, flops=3e9, state=16),
  ]
  said = report.spreads(records)
  assert said == (
    'Largest over smallest: parameters x1.12, training FLOPs x1.50, '
    'state bytes x4.00.'
  )
  studied = study.Study(title='x', architectures={'a': {}, 'b': {}})
  report.write(studied, records, 'a command', tmp_path)
  written = (tmp_path / 'report.md').read_text()
  assert said in written
  assert '| 1,120 | 112.0 | 16 | 25.0 | 3e+09 | 150.0 |' in written
  assert written.count('![') == 2


def test_an_encoder_has_no_decode_state(tmp_path):
  records = [with_sizes(name, state=0) for name in ('a', 'b')]
  studied = study.Study(title='x', architectures={'a': {}, 'b': {}})
  report.write(studied, records, 'a command', tmp_path)
  written = (tmp_path / 'report.md').read_text()
  assert 'state' not in written and written.count('![') == 1


def test_the_score_of_a_group_is_the_mean_over_its_tasks(tmp_path):
  studied = study.Study(
    title='x',
    architectures={'a': {}, 'b': {}},
    tasks={'recall': {}, 'recall vocab=32': {}, 'other': {}},
    groups={'recall': ('recall', 'recall vocab=32')},
    published={'recall': {'a': 0.7, 'b': 0.7}},
    band=0.06,
  )
  found = [
    record_of((0.1, 0.0, [score]), (0.2, 0.0, [0.1]), name=name)
    | dict(task=task)
    for task, name, score in (
      ('recall', 'a', 0.9),
      ('recall vocab=32', 'a', 0.6),
      ('recall', 'b', 0.7),  # its other setting has not run
      ('other', 'a', 0.3),
    )
  ]
  report.write(studied, found, 'a command', tmp_path)
  written = (tmp_path / 'report.md').read_text()
  assert '| a | 0.750 | 0.700 | yes | 0.900 | 0.600 |' in written
  assert '| b |  | 0.700 |  | 0.700 |  |' in written
  assert written.count('## ') == 2 and written.count('![') == 1  # of `other`
  with pytest.raises(ConfigError, match='sweep.groups.recall.*is unknown'):
    study.Study(
      title='x', architectures={'a': {}}, groups={'recall': ('recal',)}
    )


def test_lines_of_a_plot_differ():
  for key in ('color', 'marker'):
    assert len({page.style(i)[key] for i in range(12)}) == 12
  assert (
    len({(s['color'], s['marker']) for s in map(page.style, range(48))}) == 48
  )
  for color in page.COLORS:
    for ground in ('#ffffff', '#17171a'):
      assert contrast(color, ground) >= 3


def contrast(*colors):
  """Of WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

  def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
    ]
    return np.dot([0.2126, 0.7152, 0.0722], linear)

  dark, light = sorted(luminance(color) + 0.05 for color in colors)
  return light / dark


def test_every_cell_of_a_table_of_text_names_its_column():
  """A narrow screen shows the rows below each other, without the head."""
  long = 'a text that is longer than twenty-four letters'
  table = page.Table(['says', 'n', 'a "rule"'], [[long, 3, long], ['x', 4, '']])
  shown = table.html()
  assert shown.count('data-of="says"') == shown.count('data-of="n"') == 2
  assert shown.count('data-of="a &quot;rule&quot;"') == 2
  assert 'attr(data-of)' in page.STYLE
  numbers = page.Table(['says', 'n'], [[long, 3]]).html()
  assert 'data-of' not in numbers and 'class="text"' not in numbers
