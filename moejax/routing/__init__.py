"""Routing: routers, select rules, plans, losses and statistics. Knows nothing of models or training."""

from moejax.routing import select
from moejax.routing.adaptive import AdaptiveL1, AdaptiveLoss
from moejax.routing.balancers import LossFree, balancers
from moejax.routing.capacity import compute_capacity
from moejax.routing.equal_norm import EqualNorm
from moejax.routing.hashing import Hash
from moejax.routing.losses import Balance, DeviceBalance, Entropy, Importance, Routing, Spread, ZLoss, losses
from moejax.routing.plan import Entries, ExpertChoice, Merge, Plan, SoftSlots, TokenChoice
from moejax.routing.pool import AdaptPool, ExpertPool
from moejax.routing.recurrent import Recurrent, ResidualLogits, Witnessed
from moejax.routing.routers import Cosine, Linear, Random, routers
from moejax.routing.select import (
    BalancedAssignment,
    ExpertDropout,
    ExpertTopK,
    NullBalance,
    NullExperts,
    RandomSecond,
    ReLU,
    Sinkhorn,
    SoftTopAll,
    TopAny,
    TopAnyLoss,
    TopK,
    TopP,
    selects,
)
from moejax.routing.stats import routing_overlap, routing_stats

__all__ = [
    "AdaptPool", "AdaptiveL1", "AdaptiveLoss", "Balance", "BalancedAssignment", "Cosine", "DeviceBalance", "Entries", "Entropy", "EqualNorm",
    "ExpertChoice", "ExpertDropout", "ExpertPool", "ExpertTopK", "Hash", "Importance", "Linear", "LossFree", "Merge", "NullBalance",
    "NullExperts", "Plan", "Random", "RandomSecond", "ReLU", "Recurrent", "ResidualLogits", "Routing", "Sinkhorn", "SoftSlots", "SoftTopAll", "Spread",
    "TokenChoice", "TopAny", "TopAnyLoss", "TopK", "TopP", "Witnessed", "ZLoss", "balancers", "compute_capacity", "losses", "routers", "routing_overlap",
    "routing_stats", "select", "selects",
]  # fmt: skip
