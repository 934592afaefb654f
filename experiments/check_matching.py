"""Claims of studies that could not be judged, because their arms differ in what the claim says that they have equally.

    python -m experiments.check_matching [--preset=paper] [STUDY...]

Traces the train steps of the arms that claims name: seconds a study, and nothing is compiled.
"""

import argparse
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence

from ml_collections import ConfigDict

from experiments.matching import of_config, unmatched
from experiments.study import Claim, load, resolve, study_files


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the claims that could not be judged; returns 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m experiments.check_matching", description="Claims whose arms do not match.")
    parser.add_argument("--preset", choices=("cpu", "paper"), default="cpu")
    parser.add_argument("studies", nargs="*", help="all of them if none is named")
    given = parser.parse_args(argv)
    wrong = 0
    for slug in given.studies or sorted(study_files()):
        study = load(slug)
        configs = {arm: resolve(study, given.preset, arm) for arm in study.every_arm}
        for claim, reason in unjudgeable(study.claims, given.preset, configs):
            wrong += 1
            print(f"{slug}: {claim.sentence}: {reason}", flush=True)
    print(f"{wrong} claims could not be judged at preset '{given.preset}'")
    return int(wrong > 0)


def unjudgeable(claims: Iterable[Claim], preset: str, configs: Mapping[str, ConfigDict]) -> list[tuple[Claim, str]]:
    """Claims about arms of `configs` that differ in what the claim says they have equally, each with the reason; traces their steps."""
    measured = functools.cache(lambda arm, kind: of_config(configs[arm], (kind,))[kind])
    judged = [
        claim
        for claim in claims
        if claim.matched and (preset == "paper" or not claim.needs) and set(claim.arms) <= set(configs)
    ]
    found = (
        (claim, unmatched(claim.matched, {arm: {kind: measured(arm, kind) for kind in claim.matched} for arm in claim.arms}))
        for claim in judged
    )
    return [(claim, reason) for claim, reason in found if reason]


if __name__ == "__main__":
    sys.exit(main())
