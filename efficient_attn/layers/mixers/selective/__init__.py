"""Recurrences that forget and select: delta rules and state spaces."""

SELECTIVE = {}
