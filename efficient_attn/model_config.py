"""What a model is: one frozen dataclass for each kind of model.

`Config.model` is one of them: the one whose default `name` is `model.name`.
`models.spec` says what is built from each.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

from efficient_attn.values import (
  BelowOne,
  ConfigError,
  Group,
  NonNegative,
  OneOf,
  Positive,
  PositiveFloat,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Group):
  """What every model has: a stack of blocks, each a token mixer and an ffn."""

  name: str
  d_model: Positive = 256
  num_layers: Positive = 4
  num_heads: Positive = 4
  # Names of layers.MIXERS, repeated over depth: ('gla', 'gla', 'attention').
  pattern: tuple[str, ...] = ('attention',)
  # Options by mixer, used where the pattern has it:
  # {'attention': {'num_kv_heads': 2}}. A name may end in ':' and a word, to
  # give one row several sets of options: ('window:near', 'window:far').
  mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  ffn: str = 'glu'  # layers.FFNS
  # Layer i has ffn_pattern[i % its length], () is (ffn,); the first layers have
  # first_ffns instead: one dense, then experts is ('glu',) before ('moe',).
  ffn_pattern: tuple[str, ...] = ()
  first_ffns: tuple[str, ...] = ()
  # Options by ffn, as of mixers: {'moe': {'top_k': 2}, 'glu:dense': {'ffn_dim':
  # 512}}. Each row also reads ffn_dim, activation and bias, which else are
  # those of the model.
  ffns: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  ffn_dim: NonNegative = 0  # 0: 8/3 d_model for glu, 4 d_model for mlp
  ffn_bias: bool = False  # on its projections
  # layers.ACTIVATIONS; silu with glu is SwiGLU, gelu_tanh Gemma's GEGLU.
  activation: str = 'silu'
  norm: str = 'rmsnorm'  # layers.NORMS
  # Options of the norms of blocks and of the last one: {'eps': 1e-5}.
  norms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Where the norms of a block are, see layers.block.
  norm_position: Annotated[
    str, OneOf(('pre', 'post', 'sandwich', 'branch', 'normed'))
  ] = 'pre'
  # Mixer and ffn read the same stream, with a norm each or the mixer's.
  parallel: Annotated[str, OneOf(('none', 'own_norms', 'shared_norm'))] = 'none'
  # Factors of residual connections, by the name of the mixer or ffn:
  # {'lightning': {'skip': 3.5, 'branch': 1.0}}.
  residuals: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  dropout: BelowOne = 0.0
  scan_layers: bool = True  # compile one period of the pattern, not all layers
  remat: str = 'none'  # layers.REMAT_POLICIES
  # Of activations; '': float32 on CPU, else bfloat16.
  dtype: Annotated[str, OneOf(('', 'float32', 'bfloat16', 'float64'))] = ''

  prefix = 'model.'

  def __post_init__(self):
    super().__post_init__()
    if self.d_model % self.num_heads:
      below = self.d_model - self.d_model % self.num_heads
      near = [d for d in (below, below + self.num_heads) if d]
      raise ConfigError(
        f'model.d_model={self.d_model} is not divisible by '
        f'model.num_heads={self.num_heads}; nearest: {near}'
      )
    if not self.pattern:
      raise ConfigError('model.pattern=() must name at least one mixer')
    if len(self.first_ffns) > self.num_layers:
      raise ConfigError(
        f'model.first_ffns={self.first_ffns} are more than '
        f'model.num_layers={self.num_layers}'
      )
    positions = {
      'none': ('pre', 'post', 'sandwich', 'branch', 'normed'),
      'own_norms': ('pre', 'sandwich', 'branch'),
      'shared_norm': ('pre', 'sandwich'),
    }[self.parallel]
    if self.norm_position not in positions:
      raise ConfigError(
        f'model.parallel={self.parallel!r} is not possible with '
        f'model.norm_position={self.norm_position!r}; use '
        f'{" or ".join(map(repr, positions))}'
      )

  @property
  def period(self) -> int:
    """The number of layers after which mixers and ffns repeat."""
    return math.lcm(len(self.pattern), len(self.ffn_pattern) or 1)

  @property
  def layers(self) -> tuple[tuple[str, str], ...]:
    """The mixer and the ffn of each layer, by name."""
    ffns, first = self.ffn_pattern or (self.ffn,), self.first_ffns
    return tuple(
      (
        self.pattern[i % len(self.pattern)],
        first[i] if i < len(first) else ffns[i % len(ffns)],
      )
      for i in range(self.num_layers)
    )

  @property
  def patterns(self) -> dict[str, tuple[str, ...]]:
    """Its names of mixers, by the keys that have them."""
    return {'model.pattern': self.pattern}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(Group):
  """From a row of the table of embeddings to the input of the first block."""

  scale: PositiveFloat | None = None  # its factor; None: sqrt(d_model)
  norm: bool = False  # behind it, and behind positions that are added

  prefix = 'model.embedding.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsConfig(Group):
  """From products with the table of embeddings to logits.

  logits = cap(scale (table x) + bias),    cap(y) = c tanh(y / c)
  """

  scale: PositiveFloat = 1.0
  bias: bool = False
  soft_cap: PositiveFloat | None = None  # c; None: no cap

  prefix = 'model.logits.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(ModelConfig):
  """A causal decoder over tokens."""

  name: str = 'lm'
  vocab_size: Positive = 256
  # Added to the embeddings; rotary and ALiBi are options of the mixers.
  position: Annotated[str, OneOf(('none', 'learned', 'sinusoidal'))] = 'none'
  max_len: Positive = 2048  # rows of the learned positions
  tie_embeddings: bool = True
  embedding: EmbeddingConfig = EmbeddingConfig()
  logits: LogitsConfig = LogitsConfig()

  def __post_init__(self):
    if self.position in ('rotary', 'alibi'):
      raise ConfigError(
        f'model.position={self.position!r} belongs to the mixer; set '
        f'model.mixers.attention.position={self.position!r}'
      )
    super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ModelConfig):
  """A bidirectional encoder over image patches with a classifier."""

  name: str = 'vit'
  image_size: Positive = 8
  channels: Positive = 1
  patch_size: Positive = 2
  num_classes: Positive = 10
  position: Annotated[str, OneOf(('learned', 'sincos'))] = 'learned'
  pooling: Annotated[str, OneOf(('mean', 'cls'))] = 'mean'

  def __post_init__(self):
    super().__post_init__()
    if self.image_size % self.patch_size:
      raise ConfigError(
        f'model.image_size={self.image_size} is not divisible by '
        f'model.patch_size={self.patch_size}'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoEncoderConfig(LMConfig):
  """A decoder whose last vector has to hold the whole sequence."""

  name: str = 'auto_encoder'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(LMConfig):
  """A bidirectional encoder over tokens that names the masked ones (BERT).

  With norm_position='post' the embeddings have a norm of their own.
  """

  name: str = 'encoder'
  # One repetition of the pattern serves all layers, as in ALBERT.
  share_layers: bool = False
  embed_dim: NonNegative = 0  # width of the embeddings; 0: d_model

  def __post_init__(self):
    super().__post_init__()
    if self.share_layers and self.first_ffns:
      raise ConfigError(
        f'model.share_layers=True: model.first_ffns={self.first_ffns} would not'
        ' be shared; leave one of them out'
      )
    if self.share_layers and self.num_layers % self.period:
      raise ConfigError(
        f'model.share_layers=True: model.num_layers={self.num_layers} is not a '
        f'multiple of the {self.period} layers of model.pattern'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(LMConfig):
  """An encoder of source tokens and a decoder that reads it (T5)."""

  name: str = 'encoder_decoder'
  encoder_layers: NonNegative = 0  # 0: num_layers
  encoder_pattern: tuple[str, ...] = ()  # (): pattern

  @property
  def patterns(self) -> dict[str, tuple[str, ...]]:
    """Its names of mixers, by the keys that have them."""
    return super().patterns | {'model.encoder_pattern': self.encoder_pattern}

  @property
  def encoder(self) -> LMConfig:
    """The config of the encoder alone."""
    return dataclasses.replace(
      self,
      num_layers=self.encoder_layers or self.num_layers,
      pattern=self.encoder_pattern or self.pattern,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig(LMConfig):
  """An encoder or decoder over tokens with a classifier of whole sequences."""

  name: str = 'classifier'
  num_classes: Positive = 10
  causal: bool = False
  # The tokens whose vectors are read: all, or the first or last real one.
  pooling: Annotated[str, OneOf(('mean', 'first', 'last'))] = 'mean'

  def __post_init__(self):
    super().__post_init__()
    if self.causal and self.pooling == 'first':
      raise ConfigError(
        "model.pooling='first' of a causal model sees one token; use 'last', "
        "'mean' or model.causal=False"
      )


AnyModelConfig = (
  LMConfig
  | EncoderConfig
  | EncoderDecoderConfig
  | ClassifierConfig
  | AutoEncoderConfig
  | ViTConfig
)
