"""The kinds of models: what each is built from and what it is good for.

A new kind is one file here, one config class in `model_config` and one row.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import nnx

from efficient_attn.config import (
  AutoEncoderConfig,
  ClassifierConfig,
  EncoderConfig,
  EncoderDecoderConfig,
  LMConfig,
  ModelConfig,
  ViTConfig,
)
from efficient_attn.models.auto_encoder import AutoEncoder
from efficient_attn.models.classifier import Classifier
from efficient_attn.models.encoder import Encoder
from efficient_attn.models.encoder_decoder import EncoderDecoder
from efficient_attn.models.lm import LM
from efficient_attn.models.vit import ViT


class Kind(NamedTuple):
  """A row of `KINDS`.

  Attributes:
    config: its class in `Config.model`.
    build: from such a config and rngs to the model.
    objectives: the kind of batch that it reads -> the objective that it is
      trained on by default.
    unit: of its rates, tokens or images.
    generates: whether it continues a prompt.
  """

  config: type[ModelConfig]
  build: Callable[..., nnx.Module]
  objectives: Mapping[str, str]
  unit: str = 'tokens'
  generates: bool = False


# By model.name.
KINDS = {
  'lm': Kind(
    LMConfig,
    LM,
    {'text': 'next_token', 'task': 'answers'},
    generates=True,
  ),
  'encoder': Kind(EncoderConfig, Encoder, {'masked': 'masked_tokens'}),
  'encoder_decoder': Kind(
    EncoderDecoderConfig,
    EncoderDecoder,
    {'spans': 'target_tokens'},
    generates=True,
  ),
  'classifier': Kind(
    ClassifierConfig, Classifier, {'labelled': 'classification'}
  ),
  'auto_encoder': Kind(
    AutoEncoderConfig, AutoEncoder, {'task': 'every_answer'}
  ),
  'vit': Kind(ViTConfig, ViT, {'images': 'classification'}, unit='images'),
}
