"""Routing: routers, select rules, plans, losses and statistics. Knows nothing of models or training."""

from moejax.routing import select
from moejax.routing.balancers import LossFree, balancers
from moejax.routing.capacity import compute_capacity
from moejax.routing.hashing import Hash
from moejax.routing.losses import Balance, Entropy, Importance, Routing, ZLoss, losses
from moejax.routing.plan import Entries, ExpertChoice, Merge, Plan, SoftSlots, TokenChoice
from moejax.routing.routers import Cosine, Linear, Random, routers
from moejax.routing.select import ExpertTopK, RandomSecond, SoftTopAll, TopK, TopP, selects
from moejax.routing.stats import routing_stats

__all__ = [
    "Balance", "Cosine", "Entries", "Entropy", "ExpertChoice", "ExpertTopK", "Hash", "Importance", "Linear", "LossFree", "Merge",
    "Plan", "Random", "RandomSecond", "Routing", "SoftSlots", "SoftTopAll", "TokenChoice", "TopK", "TopP", "ZLoss", "balancers",
    "compute_capacity", "losses", "routers", "routing_stats", "select", "selects",
]  # fmt: skip
