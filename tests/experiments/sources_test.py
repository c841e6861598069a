"""Every statement says who says it, where, and where its figures come from."""

import collections

import pytest

from experiments.survey import report
from experiments.survey.claim import (
  DERIVED,
  FAILS,
  HOLDS,
  MEASURED,
  NOT_HERE,
  PROVENANCES,
  UNTESTED,
  Claim,
  Statement,
  elsewhere,
)
from experiments.survey.claims import CLAIMS
from experiments.survey.sources import OURS, SOURCES, cited

STATEMENTS = [
  (name, statement)
  for name, claim in CLAIMS.items()
  for statement in claim.statements
]


def test_every_statement_cites_a_place_in_a_known_document():
  for name, statement in STATEMENTS:
    places = cited(statement.source)  # raises for what is not known
    assert places or statement.source.startswith(OURS), name
    # A printed value is one that a document prints.
    assert places or not statement.printed, (name, statement.says)


def test_every_document_is_cited_and_has_authors_title_and_link():
  used = {key for _, s in STATEMENTS for key in cited(s.source)}
  assert used == SOURCES.keys()
  for source in SOURCES.values():
    assert source.authors and source.title
    assert source.link.startswith('https://')


@pytest.mark.parametrize(
  'wrong', ['XY p. 3', 'AS', 'AS p. 3; page 7', 'seed guide', '']
)
def test_a_citation_without_document_or_place_is_refused(wrong):
  with pytest.raises(ValueError, match='and a place'):
    cited(wrong)


def test_no_statement_is_made_twice():
  said = collections.Counter(s.says for _, s in STATEMENTS)
  assert not [says for says, count in said.items() if count > 1]


def test_only_what_is_not_tested_is_always_not_measured():
  for _, statement in STATEMENTS:
    assert statement.provenance in PROVENANCES
    if statement.provenance == UNTESTED:
      assert statement.judge({}) == NOT_HERE


def statement(source, verdict, provenance=MEASURED):
  return Statement(
    says=f'{source} {verdict}',
    source=source,
    measured=lambda values: '',
    judge=lambda values: verdict,
    rule='a rule',
    provenance=provenance,
  )


def test_provenances_and_our_own_statements_are_counted_apart():
  claim = Claim(
    title='One',
    tier='a',
    measure=dict,
    statements=(
      statement('AS p. 1', HOLDS),
      statement('AS p. 2', FAILS, DERIVED),
      statement('AS p. 3', NOT_HERE),  # an accelerator would measure it
      elsewhere('faster', 'AS p. 4', '2x', 'their machine'),
      statement(f'{OURS}, correcting AS p. 5', HOLDS),
    ),
  )
  record = dict(claims=dict(R99=dict(values={})))
  table = report.summary(dict(R99=claim), record)
  counts = {
    row[1]: dict(zip(table.head[3:], row[3:], strict=True))
    for row in table.rows
  }

  def of(row):
    return {verdict: n for verdict, n in counts[row].items() if n}

  assert of('all that sources say') == {HOLDS: 1, FAILS: 1, NOT_HERE: 2}
  assert of('One') == of('all that sources say')
  assert of(MEASURED) == {HOLDS: 1}
  assert of(DERIVED) == {FAILS: 1}
  assert of(UNTESTED) == {NOT_HERE: 2}
  assert of("this framework's own statements") == {HOLDS: 1}
