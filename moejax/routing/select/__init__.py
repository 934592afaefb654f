"""Select rules: logits -> plan."""

from moejax.routing.select.base import Select, selects
from moejax.routing.select.expert_choice import ExpertTopK
from moejax.routing.select.gshard import RandomSecond
from moejax.routing.select.soft_slots import SoftTopAll
from moejax.routing.select.top_k import TopK
from moejax.routing.select.top_p import TopP

__all__ = ["ExpertTopK", "RandomSecond", "Select", "SoftTopAll", "TopK", "TopP", "selects"]
