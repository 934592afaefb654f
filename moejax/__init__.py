"""moejax: mixtures in JAX.

    import moejax as mj
    layer = mj.MoE(mj.Linear(8), mj.TopK(k=2), mj.GLU(hidden=512, num_experts=8), losses=(mj.Balance(0.01), mj.ZLoss(1e-3)))

Subpackages: `routing` (routers, select rules, losses), `dispatch`, `experts`, `layers`, `models`, `data`, `train`, `serve`.
"""

from moejax.context import Context
from moejax.errors import ConfigError
from moejax.experts import FFN, GLU, LoRA
from moejax.layers import LoRAMixture, MoE, SoftMoE, WithLoRA
from moejax.routing import (
    Balance,
    Cosine,
    ExpertChoice,
    ExpertTopK,
    Importance,
    Linear,
    Merge,
    SoftSlots,
    SoftTopAll,
    TokenChoice,
    TopK,
    ZLoss,
)

__version__ = "0.1.0"

__all__ = [
    "FFN", "GLU", "Balance", "ConfigError", "Context", "Cosine", "ExpertChoice", "ExpertTopK", "Importance", "Linear", "LoRA",
    "LoRAMixture", "Merge", "MoE", "SoftMoE", "SoftSlots", "SoftTopAll", "TokenChoice", "TopK", "WithLoRA", "ZLoss",
]  # fmt: skip
