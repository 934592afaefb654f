"""Kernels of routed dispatch: one entry point per operation, each with a reference in plain `jax.numpy`."""

from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.permute import permute, unpermute

__all__ = ["grouped_matmul", "permute", "unpermute"]
