"""The families that can be loaded and saved, by their `model_type`."""

from efficient_attn.interop.families import (
  bloom,
  diffllama,
  falcon,
  gemma,
  gpt2,
  gpt_neox,
  llama,
  mistral,
  olmo,
  qwen,
  smollm3,
)

FAMILIES = {
  'llama': llama.LLAMA,
  'mistral': mistral.MISTRAL,
  'qwen2': qwen.QWEN2,
  'qwen3': qwen.QWEN3,
  'smollm3': smollm3.SMOLLM3,
  'gemma2': gemma.GEMMA2,
  'gemma3_text': gemma.GEMMA3_TEXT,
  'olmo2': olmo.OLMO2,
  'olmo3': olmo.OLMO3,
  'gpt2': gpt2.GPT2,
  'gpt_neox': gpt_neox.GPT_NEOX,
  'falcon': falcon.FALCON,
  'bloom': bloom.BLOOM,
  'diffllama': diffllama.DIFFLLAMA,
}
