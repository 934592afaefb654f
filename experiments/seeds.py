"""Which seeds a study trains next: until every claim is decided, or its looks are spent.

All arms get the seeds of the first look; then the arms of each open claim those of its next look. It depends on finished runs alone, so a
study that goes on, in another process or from the cache, trains what the first would have trained.
"""

from collections.abc import Mapping, Sequence

from experiments.cache import Run
from experiments.study import Claim, Study
from experiments.verdict import Verdict, judge

Runs = Mapping[str, Mapping[int, Run]]


def looks_at(study: Study, preset: str, claim: Claim, fixed: int | None = None) -> tuple[int, ...]:
    """The looks at a claim: those of the preset, or one after the `fixed` number of seeds."""
    return (fixed,) if fixed else study.preset(preset).looks_at(claim)


def verdicts(study: Study, preset: str, runs: Runs, fixed: int | None = None) -> tuple[Verdict, ...]:
    """The verdict on every claim all of whose arms are in `runs`, with or without seeds."""
    return tuple(
        judge(claim, runs, preset, looks_at(study, preset, claim, fixed))
        for claim in study.claims
        if set(claim.arms) <= set(runs)
    )


def next_runs(study: Study, preset: str, arms: Sequence[str], runs: Runs, fixed: int | None = None) -> list[tuple[str, int]]:
    """`(arm, seed)` of what is to be trained now, seed by seed; nothing when the study has ended.

    Args:
      arms: those that take part.
      runs: what is finished, by arm and seed.
      fixed: seeds of every arm, instead of until claims are decided.
    """
    found = {arm: runs.get(arm, {}) for arm in arms}
    first = fixed or study.preset(preset).looks[0]
    wanted = dict.fromkeys(arms, first)
    if all(seed in found[arm] for arm in arms for seed in range(first)):
        for verdict in verdicts(study, preset, found, fixed):
            for arm in verdict.claim.arms:
                wanted[arm] = max(wanted[arm], verdict.needs)
    most = max(wanted.values(), default=0)
    return [(arm, seed) for seed in range(most) for arm in arms if seed < wanted[arm] and seed not in found[arm]]
