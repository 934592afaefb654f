"""Published models, in and out: safetensors and GGUF files, their configs and their tokenizers."""

from moejax.core.folders import lazy

__getattr__, __dir__ = lazy(__name__)
