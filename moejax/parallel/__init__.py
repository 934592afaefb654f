"""Meshes, sharding rules, and programs that run on many devices and hosts."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
