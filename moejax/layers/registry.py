"""Registries of what a model author plugs in: blocks, the feed-forward layers, mixers and norms that blocks are made of, and adapters."""

from moejax.core.registry import Registry

ffns = Registry("ffn", "moejax.layers.ffn", role="ffns")
mixers = Registry("mixer", "moejax.layers.mixers", "moejax.layers.ffn.smear", role="mixers")
norms = Registry("norm", "moejax.layers.norms", role="norms")
blocks = Registry("block", "moejax.layers.blocks", "moejax.layers.depth")
adapters = Registry("adapter", "moejax.layers.adapters", role="adapters")
