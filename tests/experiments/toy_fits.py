"""Trainers that are made up and can be sent to worker processes."""

import os
import signal
import time
from pathlib import Path

from toy_studies import FakeFit

from moejax.core.errors import ConfigError
from moejax.train.stops import Interrupted, Signals


class Slow(FakeFit):
    """Notes in `folder/log` what it does and where; takes $TOY_STEP seconds a step and stops at a signal as `fit` does."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def note(self, what, label):
        arm, seed = label.split()[0], label.split()[-1]
        with open(f"{self.folder}/log", "a") as file:
            file.write(f"{os.getpid()} {what} {arm} {seed}\n")

    def __call__(self, config, **given):
        label, progress = given["label"], given["progress"]
        self.note("began", label)
        with Signals() as signals:
            signals.defer()

            def report(state):
                self.note("step", label)
                time.sleep(float(os.environ.get("TOY_STEP", 0)))
                progress(state)
                if signals.received:
                    raise Interrupted(signals.received, state.step)

            result = super().__call__(config, **{**given, "progress": report})
        self.note("finished", label)
        return result


class Sometimes(Slow):
    """Fails some runs: label -> 'raise' or 'kill'."""

    def __init__(self, folder, fails):
        super().__init__(folder)
        self.fails = fails

    def __call__(self, config, **given):
        fate = self.fails.get(given["label"])
        Path(given["workdir"]).mkdir(parents=True, exist_ok=True)
        if fate:
            self.note("began", given["label"])
        if fate == "raise":
            raise ZeroDivisionError("not today")
        if fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(config, **given)


class Mistaken(Slow):
    """Finds out late that the config is wrong."""

    def __call__(self, config, **given):
        raise ConfigError("no such split in eval.split")


class Started(Slow):
    """As `Slow`; runs that start from others ask for them first."""
