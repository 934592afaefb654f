"""Configs of published sizes, with meshes that fit 256 chips of v5e and 128 of v5p: one file a model, `get_config()`.

A mesh axis without a size takes the devices that are left, so the same file serves both. `python -m experiments.pods` compiles
them all for both slices.
"""
