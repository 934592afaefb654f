"""What a layer's forward and backward pass need, by XLA's account of the compiled program; nothing is run.

Parameters and their gradients are the floor of a dense gradient. `temporary` is all that the program needs besides its arguments and
results: activations kept for the backward pass, copies, buffers of rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
from rich.console import Console
from rich.table import Table

from experiments.bench.layer import Layer, Shape
from experiments.bench.timing import backward

BACKENDS = ("dense", "grouped", "capacity", "einsum")
SHAPES = {s.name: s for s in (Shape("reference"), Shape("glu", glu=True), Shape("e128", e=128), Shape("skewed", skewed=True))}


@dataclass(frozen=True)
class Account:
    """Bytes of one compiled program of forward and backward pass."""

    case: str
    contestant: str
    parameters: int
    results: int
    temporary: int

    @property
    def floor(self) -> int:
        """What no way of computing the gradient can do without."""
        return self.parameters + self.results


def run(names: list[str]) -> Iterator[Account]:
    """One account per case and contestant."""
    for name in names:
        layer = Layer(SHAPES[name])
        contestants = {
            b: layer.dense() if b == "dense" else layer.routed(b, None if b == "grouped" else 1.25) for b in BACKENDS
        }
        for contestant, (function, args) in backward(contestants).items():
            memory = jax.jit(function).lower(*args).compile().memory_analysis()
            yield Account(
                name, contestant, memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
            )


def show(accounts: list[Account]) -> None:
    """Prints the accounts as a table, in megabytes."""
    table = Table(
        "case", "contestant", "arguments MB", "results MB", "temporary MB", title="forward and backward pass of one layer"
    )
    for a in accounts:
        numbers = (f"{n / 1e6:.1f}" for n in (a.parameters, a.results, a.temporary))
        table.add_row(a.case, a.contestant, *numbers, end_section=a.contestant == BACKENDS[-1])
    Console().print(table)


def plot(accounts: list[Account], path: str) -> None:
    """Stacked bars: arguments, results, temporaries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.3 * len(accounts)))
    left = [0.0] * len(accounts)
    for part, colour in (("parameters", "C0"), ("results", "C1"), ("temporary", "C3")):
        widths = [getattr(a, part) / 1e6 for a in accounts]
        axis.barh(range(len(accounts)), widths, left=left, label=part, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(yticks=range(len(accounts)), yticklabels=[f"{a.case} {a.contestant}" for a in accounts], xlabel="MB")
    axis.invert_yaxis()
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
