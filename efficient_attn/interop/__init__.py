"""Weights of other libraries, both ways.

config, model = interop.load(directory)
interop.save(config, model, directory)
"""

from efficient_attn.interop.convert import load, save
from efficient_attn.interop.families import FAMILIES

__all__ = ['FAMILIES', 'load', 'save']
