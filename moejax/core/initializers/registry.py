"""The registry of initialisers."""

from moejax.core.registry import Registry

initializers = Registry("initializer", "moejax.core.initializers")
