"""What routers learnt: load, uncertainty, specialisation by domain, change between checkpoints, similarity of experts."""

from moejax.analysis.measures import balance, entropy, favourites, mutual_information, preferences, specialisation
from moejax.analysis.observe import Layer, changed, observe

__all__ = [
    "Layer", "balance", "changed", "entropy", "favourites", "mutual_information", "observe", "preferences", "specialisation",
]  # fmt: skip
