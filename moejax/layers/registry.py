"""Registries of what a model author plugs into a block: feed-forward layers and norms."""

from moejax.registry import Registry

ffns = Registry("ffn")
norms = Registry("norm")
