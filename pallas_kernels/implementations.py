"""Which implementation of an operation runs: by name, or chosen for the target.

Names, the same for every operation (each has those that it lists as `IMPLEMENTATIONS`):

    reference      plain `jax.numpy`: the definition
    xla            written for what XLA does well, on any platform
    tpu            Pallas kernel for TPU (Mosaic)
    gpu            Pallas kernel for NVIDIA GPUs (Triton)
    interpret_tpu  the TPU kernel in the TPU interpreter, on any platform: for tests
    interpret_gpu  the GPU kernel in Pallas' interpreter, on any platform: for tests

plus names of other libraries' kernels where they exist. 'auto' takes the first of the target's list that can do the job; a named
implementation runs or raises.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class Chip:
    """What kernels are written for: its kind (a key of the tuning tables) and its platform."""

    kind: str
    platform: str


# JAX's `device_kind` of each chip, in lower case -> our name for it.
_KINDS = {
    "tpu v5 lite": "v5e", "tpu v5e": "v5e", "tpu v5": "v5p", "tpu v5p": "v5p", "tpu v6 lite": "v6e", "tpu v6e": "v6e",
    "tpu7x": "tpu7x", "tpu 7x": "tpu7x", "tpu v7x": "tpu7x",
}  # fmt: skip
CHIPS = {kind: Chip(kind, "tpu") for kind in ("v5e", "v5p", "v6e", "tpu7x")} | {
    kind: Chip(kind, "gpu") for kind in ("a100", "h100", "h200", "b200")
}

_target: contextvars.ContextVar[Chip | None] = contextvars.ContextVar("target", default=None)


def current_chip() -> Chip:
    """The chip that kernels are chosen and tuned for: that of `target`, or the default device's."""
    if chip := _target.get():
        return chip
    device = jax.devices()[0]
    kind = device.device_kind.lower()
    if device.platform == "tpu":
        return Chip(_KINDS.get(kind, kind), "tpu")
    if device.platform in ("gpu", "cuda", "rocm"):
        return Chip(next((name for name in CHIPS if name in kind), kind), "gpu")
    return Chip(device.platform, device.platform)


@contextlib.contextmanager
def target(kind: str) -> Iterator[Chip]:
    """Traces for another chip than the one at hand, as compiling ahead of time does: `with target('v5e'): jit(f).lower(...)`.

    Raises:
      ValueError: unknown chip.
    """
    if kind != "cpu" and kind not in CHIPS:
        raise ValueError(f"target='{kind}' is unknown; valid names: cpu, {', '.join(CHIPS)}")
    chip = CHIPS.get(kind, Chip("cpu", "cpu"))
    token = _target.set(chip)
    try:
        yield chip
    finally:
        _target.reset(token)


def resolve(
    operation: str,
    implementation: str,
    available: tuple[str, ...],
    auto: Mapping[str, tuple[str, ...]],
    refuses: Callable[[str], str | None] = lambda name: None,
) -> str:
    """The implementation that runs.

    Args:
      operation: for messages.
      implementation: 'auto' or a name.
      available: names that the operation has.
      auto: platform ('cpu', 'tpu', 'gpu') -> names in order of preference; a platform that is not there uses 'cpu's.
      refuses: why an implementation cannot do this call (its dtypes or sizes), or None if it can.

    Raises:
      ValueError: unknown name, or a named implementation that cannot do this call.
    """
    if implementation == "auto":
        candidates = auto.get(current_chip().platform, auto["cpu"])
        return next(name for name in (*candidates, "reference") if refuses(name) is None)
    if implementation not in available:
        raise ValueError(
            f"implementation='{implementation}' of {operation} is unknown; valid names: auto, {', '.join(available)}"
        )
    if reason := refuses(implementation):
        raise ValueError(f"implementation='{implementation}' of {operation} cannot run: {reason}")
    return implementation
