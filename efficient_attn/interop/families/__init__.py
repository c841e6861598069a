"""The families that can be loaded and saved, by their `model_type`."""

from efficient_attn.interop.families import llama

FAMILIES = {
  'llama': llama.LLAMA,
}
