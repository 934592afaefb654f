"""What routers learnt: load, uncertainty, specialisation by domain, similarity of experts, change between checkpoints and under noise."""

from moejax.analysis.measures import balance, entropy, favourites, mutual_information, preferences, specialisation
from moejax.analysis.observe import Layer, changed, observe, with_noise

__all__ = [
    "Layer", "balance", "changed", "entropy", "favourites", "mutual_information", "observe", "preferences", "specialisation",
    "with_noise",
]  # fmt: skip
