"""`python -m experiments.bench BENCH [--cases=…] [--against=…] [--repeats=9] [--threads=N] [--out=runs/bench]`

dispatch  a routed layer against the dense layer of equal active FLOPs, forward and with backward
decode    few tokens, against reading the touched experts' weights once
scaling   8 to 512 experts at fixed active FLOPs
tiny      65,536 rank-one experts found by product keys (PEER)
router    what routing costs, step by step
memory    what a training step of a layer needs, by XLA's account; nothing is timed
train     training steps of small models, end to end, and where the time goes; --against=torch: beside plain PyTorch
first_step  how long it takes until a training has begun, in fresh processes
gpu       on the GPU at hand: every kernel's values, then a layer and a training step in bfloat16
kernels   the TPU kernels, compiled ahead of time, against other libraries' (--chip=v5e,v5p,v6e,tpu7x), or timed (--chip=gpu)
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from experiments.environment import machine
from moejax.core.errors import ConfigError, nearest

BENCHES = ("dispatch", "decode", "scaling", "tiny", "router", "memory", "train", "first_step", "gpu", "kernels")


def main(argv: list[str] | None = None) -> int:
    """Runs a bench; prints its table, and writes JSON and a plot beside it. Exit status 2 for a wrong name."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", nargs="?", default="dispatch")
    parser.add_argument("--cases", default="", help="comma-separated; all of them by default")
    parser.add_argument(
        "--against",
        default="",
        help="peers to measure as well: ragged_dot, huggingface; torch for train; all of its own for kernels",
    )
    parser.add_argument(
        "--chip", default="v5e", help="of the bench of kernels: v5e, v5p, v6e, tpu7x, or gpu for the one at hand"
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="cores to compute on; all of them by default")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    check("bench", [options.bench], BENCHES)
    if options.repeats < 3:
        raise ConfigError(f"--repeats={options.repeats} is too few for a median and quartiles; take at least 3")
    if options.threads:
        _hold_to(options.threads)
    against = tuple(a for a in options.against.split(",") if a)
    if options.bench == "memory":
        return _memory(options)
    if options.bench == "gpu":
        return _gpu(options)
    if options.bench == "kernels":
        return _gpu_kernels(options, against) if options.chip == "gpu" else _tpu_kernels(options, against)
    from experiments.bench import table

    cases, outcomes = _bench(options.bench, against, options.repeats)
    names = [c for c in options.cases.split(",") if c] or list(cases)
    check("--cases", names, cases)
    done = []
    for outcome in outcomes(names):
        table.show(outcome)
        done.append(outcome)
    print(table.LEGEND)
    paths = table.save(options.bench, machine(), done, options.out)
    print("wrote " + " and ".join(str(path) for path in paths))
    return 0


def _hold_to(threads: int) -> None:
    """Leaves this process some of its cores. Before JAX and PyTorch are imported: each counts them once."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ConfigError(f"--threads={threads} of {len(cores)} cores; take 1 to {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])


def _memory(options: argparse.Namespace) -> int:
    from experiments.bench import memory

    names = [c for c in options.cases.split(",") if c] or list(memory.SHAPES)
    check("--cases", names, memory.SHAPES)
    accounts = list(memory.run(names))
    memory.show(accounts)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "memory.json"
    path.write_text(json.dumps({"machine": machine(), "accounts": [asdict(a) for a in accounts]}, indent=1) + "\n")
    memory.plot(accounts, path.with_suffix(".png"))
    print(f"wrote {path} and {path.with_suffix('.png')}")
    return 0


def _gpu(options: argparse.Namespace) -> int:
    from experiments.bench import gpu, table
    from experiments.environment import device

    names = [c for c in options.cases.split(",") if c] or list(gpu.CASES)
    check("--cases", names, gpu.CASES)
    status, done = 0, []
    if "values" in names:
        lines = gpu.values()
        status = int(any(" ok " not in line for line in lines))
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu_values.txt").write_text("\n".join([device(), *lines]) + "\n")
    for outcome in (o for name in names if name != "values" for o in gpu.CASES[name](options.repeats)):
        table.show(outcome)
        done.append(outcome)
        table.save("gpu", device(), done, options.out)  # after each: the next may not fit
    return status


def _tpu_kernels(options: argparse.Namespace, against: tuple[str, ...]) -> int:
    from experiments.bench import kernels, table

    chips = options.chip.split(",")
    names = [c for c in options.cases.split(",") if c] or list(kernels.SHAPES)
    for what, given, known in (("--chip", chips, (*kernels.CHIPS, "gpu")), ("--cases", names, kernels.SHAPES)):
        check(what, given, known)
    check("--against", against, kernels.PEERS)
    rows: list[dict] = []

    def kept() -> Iterator[dict]:
        for row in kernels.run(chips, names, against or kernels.PEERS):
            rows.append(row)
            yield row

    kernels.show(kept())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    table.plot("kernels", kernels.outcomes(rows), path.with_suffix(".png"))
    print("compiled ahead of time, nothing was run: seconds follow from counted bytes and FLOPs")
    print(f"wrote {path} and {path.with_suffix('.png')}")
    return 0


def _gpu_kernels(options: argparse.Namespace, against: tuple[str, ...]) -> int:
    from experiments.bench import gpu_kernels

    names = [c for c in options.cases.split(",") if c] or list(gpu_kernels.SHAPES)
    check("--cases", names, gpu_kernels.SHAPES)
    check("--against", against, gpu_kernels.PEERS)
    results = gpu_kernels.run([gpu_kernels.SHAPES[n] for n in names], options.repeats, against or gpu_kernels.PEERS)
    print(gpu_kernels.table(results))
    print(gpu_kernels.entries(results))
    return 0


def _bench(bench: str, against: tuple[str, ...], repeats: int) -> tuple[tuple[str, ...], Callable[[list[str]], Iterator]]:
    """The names of a bench's cases, and what runs some of them."""
    from experiments.bench import dispatch, first_step, peers, router, tiny, train

    routed = bench in ("dispatch", "decode", "scaling")
    check("--against", against, peers.PEERS if routed else train.PEERS if bench == "train" else ())
    if routed:
        return tuple(dispatch.shapes(bench)), lambda names: dispatch.run(bench, names, repeats, against)
    if bench == "train":
        return tuple(train.SHAPES), lambda names: train.run(names, repeats, against)
    module = {"router": router, "tiny": tiny, "first_step": first_step}[bench]
    return tuple(module.SHAPES), lambda names: module.run(names, repeats)


def check(what: str, names: list[str] | tuple[str, ...], known: tuple[str, ...] | dict) -> None:
    """Raises ConfigError for a name that is not known, with the nearest that is."""
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown name '{name}' in {what}{nearest(name, known)}")


if __name__ == "__main__":
    sys.exit(main())
