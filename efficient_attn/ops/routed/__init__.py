"""Attention to keys that are chosen by what the tokens hold."""
