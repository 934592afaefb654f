"""Banks: stacks of experts, each kind written once against the layout."""

from moejax.experts.adapter import Adapter
from moejax.experts.dense_matched import DenseMatchedFFN
from moejax.experts.ffn import FFN, GLU
from moejax.experts.lora import LoRA
from moejax.experts.registry import ACTIVATIONS, banks
from moejax.experts.residual import Residual
from moejax.experts.train_only import TrainOnly

__all__ = ["ACTIVATIONS", "FFN", "GLU", "Adapter", "DenseMatchedFFN", "LoRA", "Residual", "TrainOnly", "banks"]
