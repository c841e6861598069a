"""Kernels of the delta rule."""
