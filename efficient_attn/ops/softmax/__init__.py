"""Softmax attention: its forms, its parts, and what is made of it."""
