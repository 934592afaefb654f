"""Training: `fit(config, seed, workdir)`, and the parts it is made of."""

from moejax.train.checkpoints import Checkpoints, CorruptCheckpoint, load
from moejax.train.flops import matmul_flops
from moejax.train.loop import fit
from moejax.train.optim import decay_mask, optimizers
from moejax.train.results import Progress, RunResult
from moejax.train.step import TrainState, init_state, make_eval_step, make_train_step
from moejax.train.stops import Interrupted, NonFiniteLoss
from moejax.train.tasks import tasks

__all__ = [
    "Checkpoints",
    "CorruptCheckpoint",
    "Interrupted",
    "NonFiniteLoss",
    "Progress",
    "RunResult",
    "TrainState",
    "decay_mask",
    "fit",
    "init_state",
    "load",
    "make_eval_step",
    "make_train_step",
    "matmul_flops",
    "optimizers",
    "tasks",
]
