"""Whether the arms of a claim are alike in what the claim says that they are.

`matched=('flops', 'params')` of a claim names what its arms must have equally, up to 3 %. A claim whose arms differ is not judged: its
verdict is *not matched*, with the two numbers and what to change. A study's `cpu` preset is not trained while one of its claims could not
be judged.

FLOPs are those of the step as it is traced: all slots of experts with a capacity, empty ones too; all experts where a rule bounds
nothing (ReLU gates, thresholds); of branches that a step draws, the longest. `active_params` has the mean number of experts that a rule
aims at.

python -m experiments.check_matching [--preset=paper] [STUDY...]     claims of all studies, or of some, that could not be judged
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ml_collections import ConfigDict

from experiments.cache import Run

TOLERANCE = 0.03


@dataclass(frozen=True)
class Kind:
    """Something that arms may have equally.

    Attributes:
      words: what it is.
      key: what to change in the config of an arm that has too little or too much of it.
    """

    words: str
    key: str


KINDS = {
    "flops": Kind("matrix FLOPs of training per token, as compiled", "the width (hidden) of its feed-forward layers"),
    "active_params": Kind("parameters that a token uses", "the width (hidden) of its feed-forward layers, or k"),
    "params": Kind("parameters", "num_experts or the width (hidden) of its experts"),
    "trainable_params": Kind("parameters that learn", "trainable, or the rank of its adapters"),
    "compute": Kind("matrix FLOPs of the whole training", "train.steps"),
    "memory": Kind("bytes of parameters and optimizer state", "num_experts, the width (hidden) of its experts, or trainable"),
    "steps": Kind("steps", "train.steps"),
}

Measured = Mapping[str, float]  # kind -> number


def of_runs(runs: Mapping[str, Run]) -> dict[str, Measured]:
    """What finished runs had, by arm. Runs of before sizes of batches were kept are compared by FLOPs of a step."""
    tokens = {arm: run.metrics.get("tokens_per_step") for arm, run in runs.items()}
    known = all(tokens.values())
    found = {}
    for arm, run in runs.items():
        sizes = {kind: run.metrics.get({"memory": "state_bytes"}.get(kind, kind)) or math.nan for kind in KINDS}
        flops = run.metrics.get("flops_per_step", math.nan)
        found[arm] = {**sizes, "flops": flops / tokens[arm] if known else flops, "compute": flops * sizes["steps"]}
    return found


def of_config(config: ConfigDict, kinds: Iterable[str] = tuple(KINDS)) -> Measured:
    """What of `kinds` a run of `config` will have, found by tracing its step: a second for FLOPs, and nothing is compiled."""
    from moejax.aot.ahead import program_of

    program, steps = program_of(config), int(config.train.steps)
    measure: dict[str, Callable[[], float]] = {
        "flops": lambda: program.flops / program.task.size(program.batch),
        "compute": lambda: program.flops * steps,
        "active_params": lambda: program.active_params,
        "params": lambda: program.params,
        "trainable_params": lambda: program.trainable_params,
        "memory": lambda: program.state_bytes,
        "steps": lambda: steps,
    }
    return {kind: measure[kind]() for kind in kinds}


def unmatched(kinds: tuple[str, ...], arms: Mapping[str, Measured]) -> str:
    """What of `kinds` the arms do not have equally, with the numbers and what to change; empty if they match.

    What was not measured, in runs of before it was kept, does not match.
    """
    for kind in kinds:
        numbers = {arm: measured[kind] for arm, measured in arms.items()}
        absent = [arm for arm, number in numbers.items() if not math.isfinite(number)]
        if absent:
            return f"'{absent[0]}' did not measure its {KINDS[kind].words}"
        least, most = min(numbers, key=numbers.get), max(numbers, key=numbers.get)
        low, high = numbers[least], numbers[most]
        if high > low * (1 + TOLERANCE):
            ratio = f"{high / low:.3g}" if low else "inf"
            return (
                f"{KINDS[kind].words}: {_short(high)} in '{most}', {_short(low)} in '{least}'; "
                f"'{least}' needs {ratio} times as many: change {KINDS[kind].key}"
            )
    return ""


def _short(number: float) -> str:
    return f"{number:.4g}" if number < 1e4 else f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.4g}M"
