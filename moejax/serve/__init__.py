"""Running trained models: decoding with a cache."""

from moejax.serve.decode import Generated, complete, generate
from moejax.serve.sampling import Greedy, Sampler, Temperature

__all__ = ["Generated", "Greedy", "Sampler", "Temperature", "complete", "generate"]
