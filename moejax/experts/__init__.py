"""Banks: stacks of experts, each kind written once against the layout."""

from moejax.experts.ffn import FFN, GLU
from moejax.experts.lora import LoRA
from moejax.experts.registry import ACTIVATIONS, banks

__all__ = ["ACTIVATIONS", "FFN", "GLU", "LoRA", "banks"]
