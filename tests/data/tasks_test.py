"""Synthetic tasks: answers are right, examples do not change, splits differ."""

import hashlib
import pickle

import jax
import numpy as np
import pytest

from efficient_attn import config as configs
from efficient_attn import data
from efficient_attn.config import ConfigError, DataConfig
from efficient_attn.data import tasks
from efficient_attn.data.tasks import TASKS
from efficient_attn.data.tasks.groups import multiplication
from efficient_attn.train.check import check_fit

# Options of small examples; those of the row by default.
SMALL = {
  'mqar': dict(vocab_size=64, segments=((64, 8, 3), (32, 4, 1))),
  'list_ops': dict(min_len=10, max_len=60, max_depth=4, max_args=5),
  'pathfinder': dict(size=16, distractors=2),
  'needle': dict(needles=4, queries=2),
  'state_tracking': dict(group='S_3', valid_after=32),
  'fuzzy_recall': dict(vocab_size=16, seq_len=64),
}

# Of the first 20 training and validation examples with the options above.
GOLDEN = {
  'compression': '885e8667dfb851f9',
  'fuzzy_recall': '03db9fcbdba06708',
  'in_context_recall': '495075a5d47c1afa',
  'induction': '5becefbf8a676889',
  'list_ops': 'def4a9b276b272ce',
  'memorization': 'ac4ec82d48379e5b',
  'mqar': 'd51eebbe5838fcdc',
  'needle': '8db3f79f4b5cefa3',
  'noisy_recall': '342a5d7685905d82',
  'palindrome': 'fb960785c23fa6cb',
  'pathfinder': '982fef067806a681',
  'selective_copying': 'e7b595ba315a089b',
  'stack': '3ef55d522b14009a',
  'state_tracking': '186e9023861d8dc6',
}


# Those of image_sequence_test.py and byte_classification_test.py.
OTHERS = {'byte_classification', 'image_sequence'}


def draw(name, seed, train=True, **options):
  task = TASKS[name](**SMALL.get(name, {}) | options)
  return task, task.draw(np.random.default_rng(seed), train)


def told(example):
  """(position, label) of the answers that count."""
  where = np.nonzero(example.weights)[0]
  return list(zip(where.tolist(), example.labels[where].tolist(), strict=True))


def recalled(tokens, t, step=2):
  """What followed the token at t where it stood before, at an even place."""
  places = [i for i in range(0, t, step) if tokens[i] == tokens[t]]
  return {int(tokens[i + 1]) for i in places}


def mqar(task, tokens, t):
  del task
  (first, *_) = [i for i in range(0, t, 2) if tokens[i] == tokens[t]]
  return tokens[first + 1]


def recall(task, tokens, t):
  del task
  (found,) = recalled(tokens, t)
  return found


def induction(task, tokens, t):
  return tokens[list(tokens).index(task.num_tokens - 1) + 1]


def needle(task, tokens, t):
  mark = task.num_tokens - 2
  (found,) = [
    tokens[i + 2]
    for i in range(t - 2)
    if tokens[i] == mark and tokens[i + 1] == tokens[t]
  ]
  return found


def selective_copying(task, tokens, t):
  content = [x for x in tokens if x < task.num_tokens - 2]
  return content[t - len(tokens) + len(content)]


def palindrome(task, tokens, t):
  del task
  return tokens[len(tokens) - 1 - t]


def stack(task, tokens, t):
  kept = {}
  for s, x in tokens[: t - 1].reshape(-1, 2):
    if x == task.num_tokens - 1:
      kept[s].pop()
    else:
      kept.setdefault(s, []).append(x)
  return kept[tokens[t - 1]][-1]


def compression(task, tokens, t):
  del task
  return tokens[t]


def state_tracking(task, tokens, t):
  product = 0
  for x in tokens[: t + 1]:
    product = multiplication(task.group)[product, x]
  return product


def list_ops(task, tokens, t):
  """By a stack machine, not by recursion."""
  del task
  operations = {10: np.min, 11: np.max, 12: np.median, 13: np.sum}
  stack = []
  for x in tokens[: t + 1].tolist():
    if x == 14:
      values = []
      while stack[-1] < 100:
        values.append(stack.pop())
      stack.append(int(operations[stack.pop() - 100](values)) % 10)
    elif x != 15:
      stack.append(x if x < 10 else x + 100 - 0)
  (value,) = stack
  return value


ORACLES = {
  'mqar': mqar,
  'induction': induction,
  'needle': needle,
  'selective_copying': selective_copying,
  'palindrome': palindrome,
  'stack': stack,
  'compression': compression,
  'state_tracking': state_tracking,
  'list_ops': list_ops,
}
# These count all next tokens in training, of which only some can be known.
RECALL = {'in_context_recall': recall, 'noisy_recall': recall}


@pytest.mark.parametrize('name', sorted(ORACLES | RECALL))
def test_answers_follow_from_the_tokens(name):
  answers = 0
  for seed in range(10):
    task, example = draw(name, seed, train=name not in RECALL)
    for t, label in told(example):
      assert label == (ORACLES | RECALL)[name](task, example.tokens, t)
      answers += 1
  assert answers >= 10


@pytest.mark.parametrize('name', sorted(TASKS.keys() - OTHERS))
def test_an_example_has_no_more_answers_than_its_task_says(name):
  most = 0
  for seed in range(20):
    task, example = draw(name, seed, train=bool(seed % 2))
    most = max(most, int((example.weights > 0).sum()))
  bound = task.most_answers
  assert most == (bound if bound is not None else most)


def test_memorization_is_one_map():
  known = {}
  for seed in range(30):
    _, example = draw('memorization', seed, train=bool(seed % 2))
    for t, label in told(example):
      assert known.setdefault(int(example.tokens[t - 1]), label) == label
  assert len(set(known.values())) == len(known) > 50


def test_fuzzy_recall_repeats_a_pair_of_motifs():
  for seed in range(20):
    task, example = draw('fuzzy_recall', seed, train=False)
    tokens = [*example.tokens, example.labels[-1]]
    end = len(tokens)
    while tokens[end - 1] >= task.vocab_size // 2:
      end -= 1
    key = tokens[end - task.motif : end]
    value = tokens[end:]
    whole = [*key, *value]
    places = [
      i for i in range(len(tokens)) if tokens[i : i + len(whole)] == whole
    ]
    assert len(places) > 1  # there before, and at the end
    assert example.weights[-len(value) :].all()


def test_mqar_segments_and_distances():
  rng = np.random.default_rng(0)
  task = TASKS['mqar'](segments=((256, 16, 1),), power=0.01)
  gaps = []
  for _ in range(200):
    where = np.nonzero(task.draw(rng, True).weights)[0]
    assert len(where) == 16 and (where % 2 == 0).all() and where.min() >= 32
    gaps += ((where - 32) // 2 + 1).tolist()
  # p(n) ~ 1 / n nearly, without replacement: near places much likelier.
  assert np.mean(np.array(gaps) <= 16) > 0.45  # of 112 places
  lengths = [
    int(np.nonzero(draw('mqar', seed)[1].tokens)[0].max()) for seed in range(40)
  ]
  assert min(lengths) < 32 < max(lengths)


def test_pathfinder_draws_two_dots_and_both_answers():
  labels = []
  for seed in range(20):
    task, example = draw('pathfinder', seed)
    assert (example.tokens == task.num_tokens - 1).sum() == 2
    assert example.weights.sum() == example.weights[-1] == 1
    labels.append(int(example.labels[-1]))
  assert set(labels) == {0, 1}


@pytest.mark.parametrize('name', sorted(GOLDEN))
def test_examples_do_not_change(name):
  assert set(GOLDEN) | OTHERS == set(TASKS)
  said = hashlib.sha256()
  for train in (True, False):
    for seed in range(20):
      task, example = draw(name, seed, train)
      assert 0 <= example.tokens.min()
      assert example.tokens.max() < task.num_tokens
      assert example.labels.max() < task.num_tokens
      assert example.weights.sum() > 0
      for x in example:
        said.update(x.tobytes())
  assert said.hexdigest()[:16] == GOLDEN[name]


@pytest.mark.parametrize('name', sorted(TASKS))
def test_batches_depend_on_the_seed_and_resume(name):
  config = DataConfig(name=name, options=SMALL.get(name, {}), valid_examples=6)
  load = dict(batch_size=4)
  first, again, other = (
    iter(data.load(config, seed=seed, **load).train) for seed in (0, 0, 1)
  )
  batch = next(first)
  assert jax.tree.map(np.shape, batch) == {
    k: (4, batch['tokens'].shape[1]) for k in ('tokens', 'labels', 'weights')
  }
  np.testing.assert_array_equal(batch['tokens'], next(again)['tokens'])
  assert (batch['tokens'] != next(other)['tokens']).any()
  state = first.get_state()
  second = next(first)['tokens']
  assert (second != batch['tokens']).any()
  first.set_state(state)
  np.testing.assert_array_equal(second, next(first)['tokens'])
  valid = list(data.load(config, seed=3, **load).valid)
  assert [len(b['tokens']) for b in valid] == [4, 4]
  assert valid[1]['weights'][2:].sum() == 0 < valid[1]['weights'][:2].sum()


def test_a_finite_training_set_comes_again():
  config = DataConfig(name='compression', train_examples=8)
  batches = iter(data.load(config, batch_size=8).train)
  one, two = (next(batches)['tokens'] for _ in range(2))
  assert {tuple(row) for row in one} == {tuple(row) for row in two}
  assert (one != two).any()  # in another order


def test_an_example_of_a_finite_set_is_drawn_once(monkeypatch):
  drawn = []
  draw = TASKS['compression'].draw

  def counted(task, rng, train):
    drawn.append(train)
    return draw(task, rng, train)

  monkeypatch.setattr(TASKS['compression'], 'draw', counted)
  # A length of its own: the test before has kept others.
  options = dict(seq_len=23)
  finite = DataConfig(name='compression', options=options, train_examples=8)
  again = [iter(data.load(finite, batch_size=4).train) for _ in range(2)]
  for _ in range(3 * 2):
    one, two = (next(batches) for batches in again)
    jax.tree.map(np.testing.assert_array_equal, one, two)
  assert drawn.count(True) == 8 + 1  # and one for its shapes
  # Those of an endless set are others every time, and of another seed.
  other = next(iter(data.load(finite, batch_size=8, seed=1).train))
  endless = DataConfig(name='compression', options=options)
  same = next(iter(data.load(endless, batch_size=8, seed=1).train))
  assert {tuple(row) for row in other['tokens']} == {
    tuple(row) for row in same['tokens']
  }


def test_a_large_finite_set_is_not_kept(monkeypatch):
  monkeypatch.setattr(tasks, 'MOST_KEPT', 1000)
  assert tasks._kept(TASKS['compression'](seq_len=20), 0, 5, True) is None
  assert tasks._kept(TASKS['compression'](seq_len=20), 0, 4, True)


def test_processes_that_prepare_batches_get_no_copy():
  examples = tasks._Examples(TASKS['compression'](), 0, 8, True)
  examples[3]
  other = pickle.loads(pickle.dumps(examples))
  assert examples.kept is not None and other.kept is None
  np.testing.assert_array_equal(other[3]['tokens'], examples[3]['tokens'])


def test_mistakes():
  for name, options, match in (
    ('mqar', dict(segments=((16, 8, 1),)), 'must be 4 times the pairs'),
    ('mqar', dict(vocab=3), "did you mean 'vocab_size'"),
    ('state_tracking', dict(group='A_5'), 'is unknown; pass parity'),
    ('needle', dict(queries=2), 'ask for 1 to all'),
    ('list_ops', dict(max_depth=1), 'cannot be so long'),
  ):
    config = DataConfig(name=name, options=options)
    with pytest.raises(ConfigError, match=match):
      data.load(config, batch_size=2)
  with pytest.raises(ConfigError, match='data.train_examples=-1'):
    DataConfig(train_examples=-1)
  values = dict(
    model=dict(name='lm', vocab_size=8), data=dict(name='compression')
  )
  config = configs.resolve(values)
  with pytest.raises(ConfigError, match="16 tokens of data.name='compression'"):
    check_fit(config, data.load(config.data, batch_size=2))
