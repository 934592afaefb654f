"""Distillation (Hinton et al. 2015): a small mixture learns digits from the probabilities of a large dense model, and not from labels alone.

5,000 images of MNIST, moved by up to a pixel. The teacher is a dense vision transformer of four times the width, with dropout; the student
has 4 experts, one per token. Weights: 1 for the teacher at T = 4, 0.1 for the labels.
"""

import dataclasses

from configs import base_vit
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, higher, lower

TEACHER = {
    "model.pattern": ("dense",),
    "model.num_layers": 4,
    "model.d_model": 128,
    "model.blocks.dense.ffn.hidden": 256,
    "model.blocks.dense.dropout": 0.1,
}
DENSE = {"model.pattern": ("dense", "dense")}


def distilled(temperature: float = 4.0, soft: float = 1.0, hard: float = 0.1, teacher: dict | None = None, **fields) -> dict:
    """The task with the arm `teacher` beside it."""
    teacher = teacher or {"kind": "run", "arm": "teacher"}
    task = {"kind": "distill", "task": {"kind": "classify"}, "teacher": teacher, "temperature": temperature}
    return {"task": {**task, "soft": soft, "hard": hard, **fields}}


def ensemble(*seeds: int) -> dict:
    """The same teachers for all students, by their seeds."""
    return {f"seed_{seed}": {"kind": "run", "arm": "teacher", "seed": seed} for seed in seeds}


def base():
    """The student: two layers of width 32 over 16 patches of 7 x 7, the second of them a mixture."""
    config = base_vit.get_config()
    config.model.image_size, config.model.patch_size = 28, 7
    config.model.d_model, config.model.num_layers = 32, 2
    config.model.blocks.dense.ffn.hidden = 64
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts, ffn.bank.hidden = 4, 64
    config.data.name = "embedded_mnist"
    config.train.steps = 600
    config.eval = {"every": 0, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


STUDY = Study(
    slug="distillation",
    title="Distilling the knowledge in a neural network",
    arxiv="1503.02531",
    implements=("moejax.Distill",),
    departures=Departures(
        scale="a twelfth of MNIST and vision transformers instead of all of it and multilayer perceptrons; the paper preset, of "
        "ImageNet, is ours",
        method="the student is a mixture; T = 4 and a weight of 0.1 for labels, where the paper's large student has T = 20",
        left_out="transfer sets without a class or with 3 % of the data, speech, and the generalist with specialists, which "
        "predict by a divergence minimised for each example",
        capacity="the student's experts have the capacity factor 1.25; the paper has no experts",
        optimizer="AdamW with a cosine; the paper's is not known to us",
        decay="0.05; the paper bounds the norm of each unit's weights instead",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("teacher", TEACHER, note="dense, four times the width, twice the depth, dropout"),
        Arm("student", note="the mixture from labels alone"),
        Arm("distilled", distilled(), note="the mixture from the teacher at T = 4, and a little from labels"),
    ),
    ablations={
        "temperature": tuple(Arm(f"T_{t:g}", distilled(t)) for t in (1.0, 2.0, 8.0, 20.0)),
        "weights": (
            Arm("soft_only", distilled(hard=0.0), note="no label is ever seen"),
            Arm("half_hard", distilled(hard=0.5), note="the weight of the paper's speech model"),
            Arm("hard_only", distilled(soft=0.0, hard=1.0), note="student, by the task with a teacher"),
        ),
        "budget": (Arm("student_longer", {"train.steps": 1200}, note="labels alone, twice the steps"),),
        "dense": (
            Arm("student_dense", DENSE, note="a dense student of the same compute, labels alone"),
            Arm("distilled_dense", {**DENSE, **distilled()}, note="the dense student with the teacher"),
        ),
        "ensemble": tuple(
            Arm(f"{mean}_mean", distilled(teacher=ensemble(0, 1, 2), mean=mean), note="three teachers of other seeds")
            for mean in ("arithmetic", "geometric")
        ),
    },
    claims=(
        higher(
            "eval/accuracy",
            "distilled",
            "student",
            headline=True,
            text="soft targets make a better student",
            matched=("params",),
        ),
        higher("eval/accuracy", "teacher", "student", text="there is something to be learned of the teacher", matched=()),
        higher("eval/accuracy", "distilled", "teacher", by=-0.01, text="which the student nearly recovers", matched=()),
        higher(
            "eval/accuracy",
            "soft_only",
            "distilled",
            by=-0.01,
            text="labels are hardly needed beside it",
            matched=("flops", "params"),
        ),
        higher(
            "eval/accuracy", "distilled", "T_1", text="a raised temperature is better than none", matched=("flops", "params")
        ),
        higher(
            "eval/accuracy",
            "distilled",
            "T_20",
            text="for a small student, T = 4 is better than T = 20",
            matched=("flops", "params"),
        ),
        higher(
            "eval/accuracy",
            "distilled",
            "student_longer",
            text="it is not that the student trains too little",
            matched=("params",),
        ),
        higher("eval/accuracy", "distilled_dense", "student_dense", text="a dense student gains too", matched=("params",)),
        lower("eval/loss", "arithmetic_mean", "distilled", text="an ensemble is a better teacher", matched=("params",)),
    ),
    presets={
        "smoke": dataclasses.replace(SMOKE, arms={"student_longer": {"train.steps": 8}}),
        "cpu": Preset(),
        # ImageNet for the paper's JFT: ViT-L/16 teaches a ViT-B/16 with 8 experts in every other layer.
        "paper": Preset(
            {
                "model.image_size": 224,
                "model.channels": 3,
                "model.patch_size": 16,
                "model.num_classes": 1000,
                "model.d_model": 768,
                "model.num_layers": 12,
                **{f"model.blocks.{b}.mixer.num_heads": 12 for b in ("dense", "moe")},
                "model.blocks.dense.ffn.hidden": 3072,
                "model.blocks.moe.ffn.num_experts": 8,
                "model.blocks.moe.ffn.bank.hidden": 3072,
                "model.dtype": "bfloat16",
                "model.remat": "full",
                "data.name": "imagenet2012",
                "data.shift": 0,
                "data.flip": True,
                "data.batch_size": 4096,
                "train.steps": 90_000,
                "train.log_every": 100,
                "optimizer.warmup_steps": 10_000,
                "optimizer.learning_rate": 1e-3,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                "teacher": {
                    "model.d_model": 1024,
                    "model.num_layers": 24,
                    "model.blocks.dense.mixer.num_heads": 16,
                    "model.blocks.dense.ffn.hidden": 4096,
                },
                "student_longer": {"train.steps": 180_000},
            },
        ),
    },
    metrics=("eval/loss", "eval/stats/max_violation"),
)
