"""Lowering for GPUs that are not there, down to Triton IR: `from kernels.gpu import lower_for, triton_kernels`.

shape = jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16)
[kernel] = triton_kernels(lower_for("h100", function, shape))
assert kernel.name == "grouped_matmul"
assert kernel.dots == {("bf16", "bf16", "f32")}

What this checks: that Pallas can write the kernel as Triton IR, that the IR verifies, and what it says. What it does not check:
that Triton's compiler takes it, its registers, or its speed.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering

from pallas_kernels.implementations import target

# Names that JAX knows the compute capability of.
DEVICES = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}
KINDS = tuple(DEVICES)


@dataclass(frozen=True)
class TritonKernel:
    """One Triton call of a lowered program.

    Attributes:
      name: of the kernel, `name=` of its `pallas_call`.
      grid: programs along x, y, z.
      num_warps, num_stages: compiler parameters.
      text: Triton IR.
    """

    name: str
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int
    text: str

    @property
    def dots(self) -> set[tuple[str, str, str]]:
        """Element types of the matrix products: (left, right, accumulator)."""
        found = re.findall(r"tt\.dot .*: tensor<[\dx]+x(\w+)> \* tensor<[\dx]+x(\w+)> -> tensor<[\dx]+x(\w+)>", self.text)
        return set(found)

    @property
    def precisions(self) -> set[str]:
        """How products of float32 are computed: 'ieee' (exact; Triton prints nothing for it) or 'tf32'."""
        found = re.findall(r"tt\.dot (.*): tensor<[\dx]+xf32> \* tensor", self.text)
        return {"tf32" if "inputPrecision = tf32" in line else "ieee" for line in found}

    @property
    def widenings(self) -> set[str]:
        """Floating types that the kernel converts to float32, as 'bf16'."""
        return set(re.findall(r"arith\.extf .*: tensor<[\dx]+x(\w+)> to tensor<[\dx]+xf32>", self.text))


def lower_for(kind: str, function: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    """Lowers `function` for one GPU of `kind` (a key of `DEVICES`): tracing and tuning tables answer for that chip.

    Args:
      kind: a key of `DEVICES`.
      function: of arrays, or of pytrees of arrays.
      args: its arguments, as arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes matter.
    """
    device = jax.sharding.AbstractDevice(device_kind=DEVICES[kind], num_cores=1, platform="gpu")
    # jax 0.12 asks the mesh which GPU a Triton kernel is for; without axes it changes nothing else.
    with target(kind), jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(lambda *a: function(*a)).trace(*args).lower(lowering_platforms=("cuda",))


def triton_kernels(lowered: jax.stages.Lowered) -> list[TritonKernel]:
    """The program's Triton kernels in order of appearance; one that is called from several places appears once."""
    found = []
    for op in _operations(lowered.compiler_ir("stablehlo").operation):
        attributes = op.attributes
        if op.name == "stablehlo.custom_call" and "triton" in ir.StringAttr(attributes["call_target_name"]).value:
            config = ir.DictAttr(attributes["mhlo.backend_config"])
            grid = tuple(ir.IntegerAttr(config[f"grid_{axis}"]).value for axis in "xyz")
            warps, stages = (ir.IntegerAttr(config[key]).value for key in ("num_warps", "num_stages"))
            with lowering._new_ir_context():
                text = str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes))
            found.append(TritonKernel(ir.StringAttr(config["name"]).value, grid, warps, stages, text))
    return found


def _operations(operation: ir.Operation) -> Iterator[ir.Operation]:
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op.operation
                yield from _operations(op.operation)
