"""Compiling with the real TPU compiler in tests: `from kernels.tpu import compile_for, custom_calls, KINDS`.

shape = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
compiled = compile_for("v5e", function, shape)
assert custom_calls(compiled) == ["grouped_matmul"]
"""

from pallas_kernels.ahead import TOPOLOGIES, compile_for, custom_calls

KINDS = tuple(TOPOLOGIES)

__all__ = ["KINDS", "compile_for", "custom_calls"]
