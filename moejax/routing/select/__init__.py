"""Select rules: logits -> plan."""

from moejax.routing.select.assignment import BalancedAssignment, Sinkhorn
from moejax.routing.select.base import Select, num_outputs, selects
from moejax.routing.select.expert_choice import ExpertTopK
from moejax.routing.select.expert_dropout import ExpertDropout
from moejax.routing.select.gshard import RandomSecond
from moejax.routing.select.null_experts import NullBalance, NullExperts
from moejax.routing.select.relu import ReLU
from moejax.routing.select.soft_slots import SoftTopAll
from moejax.routing.select.top_any import TopAny, TopAnyLoss
from moejax.routing.select.top_k import TopK
from moejax.routing.select.top_p import TopP

__all__ = [
    "BalancedAssignment", "ExpertDropout", "ExpertTopK", "NullBalance", "NullExperts", "RandomSecond", "ReLU", "Select", "Sinkhorn", "SoftTopAll",
    "TopAny", "TopAnyLoss", "TopK", "TopP", "num_outputs", "selects",
]  # fmt: skip
