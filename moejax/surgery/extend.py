"""Room for what the trained model did not have."""

import dataclasses

from moejax.core.paths import find
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries


@surgeries.register("extend")
@dataclasses.dataclass(frozen=True)
class Extend:
    """Adds arrays that the new model has and the checkpoint lacks, as they are in a model that begins untrained.

    They are those of a fresh run with the same seed. What the checkpoint has stays. What belongs to adapters needs no `extend`: it is
    new by what it is, and is made after all surgeries, beside what it adapts.

    Attributes:
      paths: patterns of the new model's paths; see `moejax.core.paths.matches`. State is 'router_state/...'.

    Raises:
      ConfigError: a pattern matches nothing in the new model, or only what the checkpoint has.
    """

    paths: tuple[str, ...]

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        leaves = checkpoint.leaves
        missing = {spelt(path): path for path in target.leaves if path not in leaves}
        wanted = set()
        for pattern in self.paths:
            find(pattern, map(spelt, target.leaves), "extend.paths")
            wanted |= {missing[name] for name in find(pattern, missing, "extend.paths (of what the checkpoint lacks)")}
        return checkpoint.with_leaves({**leaves, **target.fresh(sorted(wanted))})
