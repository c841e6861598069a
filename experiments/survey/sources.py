"""The documents whose statements are judged, and how a statement cites them.

A citation is 'KEY place', KEY of `SOURCES` and the place a page, a table, an
equation, a drawing or the heading of a section. Citations are joined by '; '.
What no document says begins with `OURS`, and names the place that it is about.
"""

import dataclasses

OURS = 'this framework'


@dataclasses.dataclass(frozen=True)
class Source:
  """A document.

  Attributes:
    authors: as it names them; of a repository its owner.
    title: with the year.
    link: where it can be read.
  """

  authors: str
  title: str
  link: str


GUIDE = 'https://github.com/Gaurav14cs17/attention_mechanisms'

SOURCES = {
  'AS': Source(
    'Jintao Zhang, Rundong Su, Chunyu Liu, Jia Wei, Ziteng Wang et al.',
    'A Survey of Efficient Attention Methods: Hardware-efficient, Sparse, '
    'Compact, and Linear Attention, 20 August 2025',
    'https://attention-survey.github.io/files/Attention_Survey.pdf',
  ),
  'FL': Source(
    'Quentin Fournier, Gaétan Marceau Caron, Daniel Aloise',
    'A Practical Survey on Faster and Lighter Transformers, ACM Computing '
    'Surveys 2023, pages of 2103.14636v2',
    'https://arxiv.org/abs/2103.14636v2',
  ),
  'S000': Source(
    'Gaurav14cs17',
    'Attention Mechanisms: The Complete Visual Encyclopedia, read-me of a '
    'study guide, 2025',
    GUIDE,
  ),
  'S001': Source(
    'Gaurav14cs17',
    'Efficient Attention Methods Survey, read-me of a study guide, 2025',
    f'{GUIDE}/blob/main/Efficient_Attention_Survey/README.md',
  ),
  'BLOG': Source(
    'Gaurav14cs17',
    'The Complete Visual Guide to Efficient Attention, with its drawings, 2025',
    f'{GUIDE}/blob/main/Efficient_Attention_Survey/BLOG_README.md',
  ),
  'FLR': Source(
    'Gaurav14cs17',
    'A Practical Survey on Faster and Lighter Transformers, read-me of a study '
    'guide, with its drawings, 2025',
    f'{GUIDE}/tree/main/Faster%20and%20Lighter%20Transformers',
  ),
  'S002': Source(
    'Gaurav14cs17',
    'Attention Mechanisms: A Visual Guide, read-me of a study guide, 2025',
    'https://github.com/Gaurav14cs17/LLMs_Model/blob/main/atten/README.md',
  ),
  'S003': Source(
    'gaurav-redhat',
    'The Complete Transformer Guide, read-me of a study guide, December 2025',
    'https://github.com/gaurav-redhat/Transformer',
  ),
  'LRA': Source(
    'Yi Tay, Mostafa Dehghani, Samira Abnar, Yikang Shen et al.',
    'Long Range Arena: A Benchmark for Efficient Transformers, 2020',
    'https://arxiv.org/abs/2011.04006',
  ),
  'MobileBERT': Source(
    'Zhiqing Sun, Hongkun Yu, Xiaodan Song, Renjie Liu et al.',
    'MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices, '
    '2020',
    'https://arxiv.org/abs/2004.02984',
  ),
}


def cited(citation: str) -> dict[str, str]:
  """Returns the places that a citation names, by source.

  Raises:
    ValueError: it names a document that is not in `SOURCES`, or no place.
  """
  if citation.startswith(OURS):
    return {}
  found = {}
  for part in citation.split('; '):
    key, _, place = part.partition(' ')
    if key not in SOURCES or not place:
      raise ValueError(
        f'{citation!r} cites {part!r}; write one of {", ".join(SOURCES)} and a '
        'place'
      )
    found[key] = place
  return found
