"""What a person sees while arms train: one live line per arm and seed in a terminal, occasional plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from experiments.cache import run_label
from experiments.tables import duration

PLAIN_EVERY = 10.0  # seconds between two plain lines of a run


class Board:
    """Shows the runs of a study. Use as a context manager; `line` gives a run its line."""

    def __init__(self, console: Console, width: int):
        """`width`: length of the longest arm name."""
        self.console = console
        self.width = width
        self._live = _columns(console) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def line(self, arm: str, seed: int, steps: int) -> "Line":
        """Adds the line of one run."""
        name = f"{arm:<{self.width}}  seed {seed}"
        return Line(name, run_label(arm, seed), steps, self.console, self._live)


class Line:
    """One run's line. Called with the trainer's progress, also of runs that it starts from; `finish` ends it."""

    def __init__(self, name: str, label: str, steps: int, console: Console, live: Progress | None):
        self.name, self.label, self.steps, self.console, self.live = name, label, steps, console, live
        self._last = -PLAIN_EVERY
        self._phase = ("", "")
        # One more than the steps: the final evaluation. Until it is done the line has no tick.
        self._task = live.add_task(name, total=steps + 1, count=f"0/{steps}", facts="waiting", start=False) if live else None

    def __call__(self, progress: Any) -> None:
        facts, own = _facts(progress), progress.label == self.label
        count, phase = f"{progress.step}/{progress.steps}", (progress.label, progress.phase)
        # The place of what is trained first: 'init.source' of 'init.source of dense seed 0'.
        first = "" if own else f"first {progress.label.removesuffix(f' of {self.label}')}: "
        if self.live:
            self.live.start_task(self._task)
            done, count, facts = (progress.step, count, facts) if own else (0, f"0/{self.steps}", f"{first}{count}  {facts}")
            self.live.update(self._task, completed=done, count=count, facts=facts)
        elif phase != self._phase or time.monotonic() - self._last > PLAIN_EVERY:
            self._last, self._phase = time.monotonic(), phase
            self._print(f"{first}step {count}  {facts}")

    def finish(self, facts: str) -> None:
        """The run is there; `facts` says how it ended."""
        if self.live:
            self.live.start_task(self._task)
            self.live.update(self._task, completed=self.steps + 1, count=f"{self.steps}/{self.steps}", facts=facts)
            self.live.stop_task(self._task)
        else:
            self._print(facts)

    def fail(self) -> None:
        """The run has ended with an error, which is told elsewhere."""
        if self.live:
            self.live.update(self._task, facts="failed")
            self.live.stop_task(self._task)

    def _print(self, text: str) -> None:
        self.console.print(f"{self.name}  {text}", highlight=False, markup=False, soft_wrap=True)


def _columns(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", justify="right"),
        TextColumn("{task.fields[facts]}", style="dim", markup=False),
        console=console,
        refresh_per_second=4,
    )


def _facts(progress: Any) -> str:
    """Loss, speed, time left and phase: what is known of them."""
    parts: list[tuple[Any, Callable[[Any], str]]] = [
        (progress.loss, lambda x: f"loss {x:.4f}"),
        (progress.tokens_per_second, lambda x: f"{x:,.0f} tokens/s"),
        (progress.seconds_left, lambda x: f"{duration(x)} left"),
        (progress.phase, lambda phase: "waiting for another process" if phase == "waiting" else phase),
    ]
    return "  ".join(show(value) for value, show in parts if value)
