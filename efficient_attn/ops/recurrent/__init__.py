"""Ops with a state: linear attention, delta rules, scans, fast weights."""
