"""Every claim, by its number."""

from experiments.survey.claims.arithmetic import ARITHMETIC
from experiments.survey.claims.attention_guide import ATTENTION_GUIDE
from experiments.survey.claims.blocks import BLOCKS
from experiments.survey.claims.budgets import BUDGETS
from experiments.survey.claims.caches import CACHES
from experiments.survey.claims.complexity import COMPLEXITY
from experiments.survey.claims.compression import COMPRESSION
from experiments.survey.claims.cost_tables import COST_TABLES
from experiments.survey.claims.decisions import DECISIONS
from experiments.survey.claims.decoding import DECODING
from experiments.survey.claims.distillation import DISTILLATION
from experiments.survey.claims.errata import ERRATA
from experiments.survey.claims.fast_weights import FAST_WEIGHTS
from experiments.survey.claims.feature_maps import FEATURE_MAPS
from experiments.survey.claims.guide_equations import GUIDE_EQUATIONS
from experiments.survey.claims.hardware import HARDWARE
from experiments.survey.claims.hashing import HASHING
from experiments.survey.claims.layouts import LAYOUTS
from experiments.survey.claims.linear_forms import LINEAR_FORMS
from experiments.survey.claims.linear_gates import LINEAR_GATES
from experiments.survey.claims.low_rank import LOW_RANK
from experiments.survey.claims.lra import LRA
from experiments.survey.claims.memory import MEMORY
from experiments.survey.claims.memory_tricks import MEMORY_TRICKS
from experiments.survey.claims.patterns import PATTERNS
from experiments.survey.claims.quality import QUALITY
from experiments.survey.claims.quality_compact import QUALITY_COMPACT
from experiments.survey.claims.quality_rows import QUALITY_ROWS
from experiments.survey.claims.quantization import QUANTIZATION
from experiments.survey.claims.random_features import RANDOM_FEATURES
from experiments.survey.claims.recurrences import RECURRENCES
from experiments.survey.claims.scaling import SCALING
from experiments.survey.claims.selectors import SELECTORS
from experiments.survey.claims.speed import SPEED
from experiments.survey.claims.swaps import SWAPS
from experiments.survey.claims.toolkit import TOOLKIT
from experiments.survey.claims.traffic import TRAFFIC
from experiments.survey.claims.transformer_guide import TRANSFORMER_GUIDE

GROUPS = (
  MEMORY,
  TRAFFIC,
  HARDWARE,
  LAYOUTS,
  CACHES,
  RANDOM_FEATURES,
  RECURRENCES,
  ERRATA,
  COMPLEXITY,
  QUALITY,
  FEATURE_MAPS,
  PATTERNS,
  HASHING,
  LOW_RANK,
  BUDGETS,
  SELECTORS,
  LRA,
  SCALING,
  BLOCKS,
  MEMORY_TRICKS,
  QUANTIZATION,
  COMPRESSION,
  DECODING,
  ARITHMETIC,
  FAST_WEIGHTS,
  SPEED,
  COST_TABLES,
  LINEAR_FORMS,
  LINEAR_GATES,
  QUALITY_ROWS,
  ATTENTION_GUIDE,
  TRANSFORMER_GUIDE,
  GUIDE_EQUATIONS,
  QUALITY_COMPACT,
  SWAPS,
  DECISIONS,
  TOOLKIT,
  DISTILLATION,
)
CLAIMS = dict(sorted({k: v for g in GROUPS for k, v in g.items()}.items()))
