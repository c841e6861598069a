"""Every claim, by its number."""

from experiments.survey.claims.complexity import COMPLEXITY
from experiments.survey.claims.hardware import HARDWARE
from experiments.survey.claims.memory import MEMORY
from experiments.survey.claims.patterns import PATTERNS
from experiments.survey.claims.recurrences import RECURRENCES
from experiments.survey.claims.traffic import TRAFFIC

CLAIMS = dict(
  sorted(
    (MEMORY | TRAFFIC | HARDWARE | PATTERNS | RECURRENCES | COMPLEXITY).items()
  )
)
