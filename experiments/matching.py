"""Whether the arms of a claim are alike in what the claim says that they are.

`matched=('flops', 'params')` of a claim names what its arms must have equally, up to 3 %. A claim whose arms differ is not judged: its
verdict is *not matched*, with the two numbers and what to change.
"""

import math
from collections.abc import Mapping
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


def of_config(config: ConfigDict) -> Measured:
    """What a run of `config` will have, found by tracing its step: seconds, and nothing is compiled."""
    from moejax.aot.ahead import program_of

    program = program_of(config)
    return {
        "flops": program.flops / program.task.size(program.batch),
        "compute": program.flops * int(config.train.steps),
        "active_params": program.active_params,
        "params": program.params,
        "trainable_params": program.trainable_params,
        "memory": program.state_bytes,
        "steps": int(config.train.steps),
    }


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
