"""Softmax attention on a TPU."""
