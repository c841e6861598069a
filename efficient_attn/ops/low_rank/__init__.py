"""Attention with fewer logits than pairs of tokens, or with learned ones."""
