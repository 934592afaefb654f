"""Kernels of routed dispatch: one entry point per operation, each with a reference in plain `jax.numpy`."""

from pallas_kernels.grouped_glu import grouped_glu
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.low_rank import low_rank_grouped_matmul
from pallas_kernels.permute import permute, unpermute
from pallas_kernels.product_keys import product_key_top_k
from pallas_kernels.rank_one import rank_one_experts

__all__ = [
    "grouped_glu",
    "grouped_matmul",
    "low_rank_grouped_matmul",
    "permute",
    "product_key_top_k",
    "rank_one_experts",
    "unpermute",
]
