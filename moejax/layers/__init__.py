"""What a model author plugs in: routed and dense feed-forward layers, LoRA mixtures, norms.

`MixtureOfDepths` wraps a whole block and is imported with the models: `moejax.layers.depth`.
"""

from moejax.layers.chain import ChainOfExperts
from moejax.layers.competition import Competition
from moejax.layers.dense import DenseFFN, DenseGLU
from moejax.layers.lora import LoRAMixture, WithLoRA, adapted_layers
from moejax.layers.moe import MoE
from moejax.layers.multi_hash import MultiHash
from moejax.layers.norms import LayerNorm, RMSNorm
from moejax.layers.product_keys import ProductKeys
from moejax.layers.registry import ffns, norms
from moejax.layers.smear import SMEAR
from moejax.layers.soft_moe import SoftMoE
from moejax.layers.vq import VQMoE

__all__ = [
    "SMEAR", "ChainOfExperts", "Competition", "DenseFFN", "DenseGLU", "LayerNorm", "LoRAMixture", "MoE", "MultiHash",
    "ProductKeys", "RMSNorm", "SoftMoE", "VQMoE", "WithLoRA", "adapted_layers", "ffns", "norms",
]  # fmt: skip
