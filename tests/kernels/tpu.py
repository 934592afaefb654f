"""Compiling with the real TPU compiler in tests, and what the TPU interpreter saw.

from kernels.tpu import KINDS, compile_for, custom_calls, no_races

shape = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
compiled = compile_for("v5e", function, shape)
assert custom_calls(compiled) == ["grouped_matmul"]
"""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from pallas_kernels.ahead import TOPOLOGIES, compile_for, custom_calls

KINDS = tuple(TOPOLOGIES)


def no_races() -> bool:
    """Whether the last kernel that ran in the TPU interpreter with `detect_races` had none; wait for its results first."""
    return interpret_pallas_call.races is not None and not interpret_pallas_call.races.races_found


__all__ = ["KINDS", "compile_for", "custom_calls", "no_races"]
