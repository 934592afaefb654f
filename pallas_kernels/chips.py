"""What TPUs can do, per device as JAX counts devices: the published figures that tile sizes and rooflines follow from."""

from dataclasses import dataclass

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Tpu:
    """One device.

    Attributes:
      flops: peak bfloat16 FLOP/s.
      bandwidth: of HBM, in bytes/s.
      hbm: bytes of HBM that programs may use, as the compiler counts: a little less than there are.
      links: bytes/s that all links to other chips together carry in one direction.
      vmem: bytes of VMEM of one core.
      mxu: rows and columns of the matrix units.
      cores: cores that share one kernel's work (megacore).
      asynchronous: devices of the largest slice whose all-to-alls the compiler can run beside computation; None for any.
    """

    flops: float
    bandwidth: float
    hbm: int
    links: float
    vmem: int
    mxu: int
    cores: int = 1
    asynchronous: int | None = None


# FLOP/s, bandwidth and links: cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x (a tpu7x chip is two devices, so half of
# its 2307 TFLOP/s, 7380 GB/s and 1200 GB/s in both directions each). HBM: what libtpu says when a program needs more. The slices:
# tried. The rest: jax.experimental.pallas.tpu.get_tpu_info_for_chip.
TPUS = {
    "v5e": Tpu(flops=197e12, bandwidth=819e9, hbm=int(15.75 * GIB), links=200e9, vmem=128 * MIB, mxu=128, asynchronous=16),
    "v5p": Tpu(flops=459e12, bandwidth=2765e9, hbm=int(95.74 * GIB), links=600e9, vmem=64 * MIB, mxu=128, cores=2),
    "v6e": Tpu(flops=918e12, bandwidth=1640e9, hbm=int(31.25 * GIB), links=448e9, vmem=128 * MIB, mxu=256),
    "tpu7x": Tpu(flops=2307e12 / 2, bandwidth=7380e9 / 2, hbm=int(94.75 * GIB), links=300e9, vmem=64 * MIB, mxu=256),
}
