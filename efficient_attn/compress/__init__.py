"""Smaller versions of trained models."""
