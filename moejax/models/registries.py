"""The registries of a model's slots. They live apart from the classes so that layers can register blocks without a cycle."""

from moejax.registry import Registry

mixers = Registry("mixer")
blocks = Registry("block")
models = Registry("model")
