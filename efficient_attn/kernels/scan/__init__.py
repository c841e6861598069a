"""Kernels of elementwise recurrences."""
