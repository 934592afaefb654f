"""From dense layers to mixtures."""

import dataclasses
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.core.errors import ConfigError
from moejax.core.fields import NonNegative
from moejax.core.params import Path
from moejax.core.paths import find, listed
from moejax.surgery.base import Checkpoint, Target, spelt, surgeries


@surgeries.register("upcycle")
@dataclasses.dataclass(frozen=True)
class Upcycle:
    """`W_e = W` for every expert e of a mixture, where the checkpoint has a dense layer W (Komatsuzaki et al. 2022).

        init = {'source': dense, 'surgeries': {'upcycle': {}, 'extend': {'paths': ('*/router',)}}, 'order': ('upcycle', 'extend')}

    The dense layer lies where the mixture will be and is of the bank's kind and width: 'x/ffn/expert' becomes 'x/ffn/bank'. Router
    and state are new, by `extend`. With weights that sum to 1 over a token's experts, and no drops, the model computes what the dense
    one did.

    Attributes:
      banks: patterns of the new model's banks.
      dense: what the dense layer is called beside the bank.
      noise: adds normal noise to each expert, with this share of the standard deviation of the tensor it is copied from.

    Raises:
      ConfigError: a pattern matches nothing that has experts, or there is no dense layer of that shape in the checkpoint.
    """

    banks: tuple[str, ...] = ("*/bank",)
    dense: str = "expert"
    noise: NonNegative = 0.0

    def __call__(self, checkpoint: Checkpoint, target: Target) -> Checkpoint:
        leaves, wanted = checkpoint.leaves, target.leaves
        known = flax.traverse_util.flatten_dict({"params": target.parameters})
        stacked = {spelt(path): path for path, parameter in known.items() if "expert" in parameter.axes}
        taken: set[Path] = set()
        for pattern in self.banks:
            find(pattern, (spelt(path) for path in wanted), "upcycle.banks")
            for name in find(pattern, stacked, "upcycle.banks (of what has experts)"):
                path = stacked[name]
                source, axis = (*path[:-2], self.dense, path[-1]), known[path].axes.index("expert")
                shape = wanted[path].shape
                self._check(leaves, source, path, (*shape[:axis], 1, *shape[axis + 1 :]))
                copies = jnp.repeat(leaves[source], shape[axis], axis=axis)
                leaves[path] = self._noisy(copies, leaves[source], jax.random.fold_in(target.key, len(taken)))
                taken.add(source)
        return checkpoint.with_leaves({path: x for path, x in leaves.items() if path not in taken})

    def _check(self, leaves: dict[Path, Any], source: Path, path: Path, shape: tuple[int, ...]) -> None:
        if source not in leaves:
            beside = sorted(spelt(other) for other in leaves if other[: len(path) - 2] == path[:-2])
            raise ConfigError(
                f"upcycle: '{spelt(path)}' is to be copies of '{spelt(source)}', which the checkpoint lacks; it has "
                f"{listed(beside) or 'nothing'} there (rename first, or say upcycle.dense)"
            )
        if leaves[source].shape != shape:
            raise ConfigError(
                f"upcycle: '{spelt(source)}' {list(leaves[source].shape)} cannot be each expert of '{spelt(path)}', which needs "
                f"{list(shape)}; experts are as wide as the dense layer"
            )

    def _noisy(self, copies: Array, dense: Array | np.ndarray, key: Array) -> Array:
        if not self.noise:
            return copies
        return copies + self.noise * jnp.std(dense) * jax.random.normal(key, copies.shape, copies.dtype)
