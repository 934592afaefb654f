"""moejax: mixtures in JAX.

    import moejax as mj
    layer = mj.MoE(mj.Linear(8), mj.TopK(k=2), mj.GLU(hidden=512, num_experts=8), losses=(mj.Balance(0.01), mj.ZLoss(1e-3)))

Subpackages: `routing` (routers, select rules, losses), `dispatch`, `experts`, `layers`, `models`, `data`, `train`, `serve`.
Names are imported on first use, so that tools which only read configs start at once.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "context": ["Context"],
    "errors": ["ConfigError"],
    "experts": ["FFN", "GLU", "LoRA"],
    "layers": ["LoRAMixture", "MoE", "SoftMoE", "WithLoRA"],
    "routing": [
        "Balance", "Cosine", "ExpertChoice", "ExpertTopK", "Importance", "Linear", "Merge", "RandomSecond", "SoftSlots", "SoftTopAll",
        "TokenChoice", "TopK", "ZLoss",
    ],
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moejax' has no attribute '{name}'")
    return getattr(importlib.import_module(f"moejax.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
