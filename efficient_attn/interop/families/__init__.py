"""The families that can be loaded and saved, by their `model_type`."""

from efficient_attn.interop.families import (
  gpt2,
  llama,
  mistral,
  qwen,
  smollm3,
)

FAMILIES = {
  'llama': llama.LLAMA,
  'mistral': mistral.MISTRAL,
  'qwen2': qwen.QWEN2,
  'qwen3': qwen.QWEN3,
  'smollm3': smollm3.SMOLLM3,
  'gpt2': gpt2.GPT2,
}
