"""LoRA mixtures: low-rank experts added to a Dense layer, and an adapter that puts them around the Dense layers of any model."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import flax
import flax.linen as nn
from jaxtyping import Array, Float

from moejax.core.context import Context
from moejax.core.errors import ConfigError
from moejax.experts.lora import LoRA
from moejax.layers.ffn.dense import run_single
from moejax.layers.ffn.moe import MoE
from moejax.routing.losses.base import Loss
from moejax.routing.routers.linear import Linear
from moejax.routing.select import TopK


class LoRAMixture(nn.Module):
    """`y = dense(x) + scale * sum_e weight_e(x) (x A_e) B_e`, the sum over each token's plan. Zero at the start.

    Attributes:
      features: output width of the adapted layer.
      num_experts: e; with 1, plain LoRA without a router.
      rank: r of each expert.
      scale: explicit; `alpha / r` in most papers.
      select: any select rule; by default a softmax over all experts, every expert used (a soft mixture).
      losses: sown like those of any routed layer.
    """

    features: int
    num_experts: int
    rank: int
    scale: float = 1.0
    select: Any = None
    losses: tuple[Loss, ...] = ()

    role = "adapters"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], ctx: Context | None = None) -> Float[Array, "*b o"]:
        """The mixture's own output, without the dense layer's."""
        bank = LoRA(self.rank, self.features, num_experts=self.num_experts, scale=self.scale, name="bank")
        if self.num_experts == 1:
            return run_single(bank, x, ctx or Context())
        select = self.select or TopK(k=self.num_experts)
        router = Linear(self.num_experts, outputs=select.outputs, name="router")
        layer = MoE(router=router, select=select, bank=bank, losses=self.losses, name="moe")
        rows = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
        return layer(rows, ctx).reshape(*x.shape[:-1], self.features)


class WithLoRA(nn.Module):
    """A model whose Dense layers gained LoRA mixtures, without the model knowing.

    The parameter tree is the model's own, with one entry `lora` more beside the kernel of each adapted layer, so a pretrained
    tree fits as it is. Works inside scanned and rematerialised layers.

        adapted = WithLoRA(model, targets=('*/q', '*/v'), num_experts=4, rank=8, scale=2.0)

    Attributes:
      model: any Linen model.
      targets: glob patterns of paths of Dense layers inside the model. A pattern that matches nothing is an error: an adapter
        that misses its layers trains nothing and says nothing.
      num_experts, rank, scale, select, losses: see `LoRAMixture`.
    """

    model: nn.Module
    targets: tuple[str, ...]
    num_experts: int
    rank: int
    scale: float = 1.0
    select: Any = None
    losses: tuple[Loss, ...] = ()

    def setup(self) -> None:
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output. Raises ConfigError for a target that matches no Dense layer."""
        seen: list[str] = []
        # Of the modules that are being called, the innermost that was given a context describes the tokens of a Dense layer:
        # blocks may see some of the tokens, or rearranged ones.
        contexts: list[Context | None] = [None]

        def add_mixture(call: Callable[..., Any], args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
            contexts.append(next((a for a in (*args, *kwargs.values()) if isinstance(a, Context)), contexts[-1]))
            y, dense = call(*args, **kwargs), context.module
            ctx = contexts.pop()
            if not isinstance(dense, nn.Dense) or context.method_name != "__call__":
                return y
            path = "/".join(dense.path[len(self.path) :])
            seen.append(path)
            if not self._targeted(path):
                return y
            # A scope of the Dense layer's own, so that lifted transforms (scan, remat) treat the mixture like its kernel.
            mixture = LoRAMixture(
                dense.features, self.num_experts, self.rank, self.scale, self.select, self.losses,
                parent=dense.scope.push("lora"),
            )  # fmt: skip
            return y + mixture(args[0], ctx if args[0].ndim == 3 else None)

        with nn.intercept_methods(add_mixture):
            y = self.model(*args, **kwargs)
        for target in self.targets:
            if not fnmatch.filter(seen, target):
                raise ConfigError(f"targets='{target}' matches no Dense layer; there are: {', '.join(sorted(set(seen)))}")
        return y

    def _targeted(self, path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, target) for target in self.targets)


def adapted_layers(params: Mapping[str, Any]) -> list[str]:
    """Paths of the layers that carry a LoRA mixture: what was adapted, to be looked at before training."""
    flat = flax.traverse_util.flatten_dict(params)
    return sorted({"/".join(path[: path.index("lora")]) for path in flat if "lora" in path})
