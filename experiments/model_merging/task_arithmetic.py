"""Task arithmetic (Ilharco et al. 2023), with TIES (Yadav et al. 2023) and DARE (Yu et al. 2023): skills of two models, added up.

Byte language models, every other feed-forward layer a mixture of 8 experts. One start is trained on all three domains of the text; it is
fine-tuned on code alone and on literature alone, and the two are merged without any training. What is merged is judged on both domains,
on validation data, which a scale may be tuned on.
"""

import dataclasses

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, optimum, within

DOMAINS = ("code", "literature")
ALL = ("code", "reference", "literature")
START = {"init.source": {"kind": "run", "arm": "start"}}
BOTH, CODE, LITERATURE = "eval/*/bits_per_byte", "eval/code/bits_per_byte", "eval/literature/bits_per_byte"


def tuned(*domains: str) -> dict:
    """Fine-tuning of the start on some domains: half a training, at a third of the rate."""
    return {
        **START,
        "data.domains": domains,
        "train.steps": 1500,
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 50,
    }


def run(domain: str, **more) -> dict:
    return {"kind": "run", "arm": f"tuned_{domain}", **more}


def alone(domain: str) -> dict:
    """A fine-tuned model, judged on both domains."""
    return {"init.source": run(domain), "train.steps": 0}


def merged(kind: str = "task_arithmetic", domains: tuple[str, ...] = DOMAINS, others: dict | None = None, **fields) -> dict:
    """The start and what fine-tuning added to it."""
    others = others or {domain: run(domain) for domain in domains}
    return {**START, "init.others": others, "init.surgeries": {kind: fields}, "train.steps": 0}


def three(kind: str = "task_arithmetic", **fields) -> dict:
    return {**merged(kind, ALL, **fields), "data.domains": ALL}


def base():
    """The start."""
    config = small_lm.get_config()
    config.data.domains = DOMAINS
    return config


SHORT = ("start", "tuned_code", "tuned_reference", "tuned_literature", "joint")

STUDY = Study(
    slug="task_arithmetic",
    title="Task arithmetic: editing models by adding what fine-tuning changed",
    arxiv="2212.04089",
    implements=("moejax.TaskArithmetic", "moejax.Ties", "moejax.OnTaskVectors"),
    departures=Departures(
        scale="domains of one corpus instead of tasks with heads of their own; a start of seconds that has seen the domains "
        "already",
        method="mixtures and gated layers here; the scale of `merged` was fixed before anything was run, where the papers tune "
        "theirs on validation data, as the ablation does",
        left_out="vision, toxicity, analogies (any three fine-tuned runs and scales -1, 1, 1), learned and per-tensor scales, "
        "Breadcrumbs, the cosines between task vectors, and merging without norms or embeddings",
        capacity="none",
        optimizer="fine-tuning at a third of the start's rate here; rates of the paper preset are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    starts=(
        Arm("start", {"data.domains": ALL}, note="all three domains"),
        *(Arm(f"tuned_{domain}", tuned(domain), note=f"the start, fine-tuned on {domain}") for domain in ALL),
    ),
    arms=(
        Arm("pretrained", {**START, "train.steps": 0}, note="the start itself"),
        Arm("code", alone("code"), note="fine-tuned on code"),
        Arm("literature", alone("literature"), note="fine-tuned on literature"),
        Arm("joint", tuned(*DOMAINS), note="fine-tuned on both, for as long as each of them: needs both data sets at once"),
        Arm("average", merged(scale=0.5), note="the mean of the two models: scale 1/2"),
        Arm("merged", merged(scale=0.75), note="the start and three quarters of both task vectors"),
    ),
    ablations={
        "scale": tuple(Arm(f"scale_{s:g}", merged(scale=s)) for s in (0.25, 1.0, 1.5)),
        "ties": (
            Arm("ties", merged("ties"), note="a fifth of the entries, scale 1"),
            Arm("ties_0.5", merged("ties", keep=0.5), note="half of the entries"),
            Arm("ties_1", merged("ties", keep=1.0), note="all entries: signs are elected, nothing is trimmed"),
            Arm("ties_sum", merged("ties", combine="sum"), note="those who agree are added up"),
        ),
        "dare": (
            Arm("dare_0.5", merged(scale=0.75, drop=0.5), note="half of the entries dropped, the others doubled"),
            Arm("dare_0.9", merged(scale=0.75, drop=0.9), note="nine tenths dropped"),
            Arm("dare_0.9_raw", merged(scale=0.75, drop=0.9, rescale=False), note="and the others left as they are"),
            Arm("dare_ties", merged("ties", keep=1.0, drop=0.5), note="TIES of what is left"),
        ),
        "forget": tuple(
            Arm(f"forget_code_{s:g}", merged(scale={"code": -s}), note="the start without what code added") for s in (0.3, 0.6)
        ),
        "three": (
            Arm("three_average", three(scale=1 / 3), note="three tasks"),
            Arm("three_merged", three(scale=0.6), note="three tasks"),
            Arm("three_ties", three("ties"), note="three tasks"),
        ),
        "strangers": (
            Arm(
                "strangers",
                merged(scale=0.75, others={"code": run("code"), "literature": run("literature", seed=101)}),
                note="literature was fine-tuned from another start",
            ),
        ),
    },
    claims=(
        lower(
            BOTH,
            "merged",
            "pretrained",
            headline=True,
            text="adding two task vectors makes one model better at both",
            matched=("params",),
        ),
        lower(BOTH, "merged", "code", text="it is better at both than the model of one", matched=("params",)),
        lower(BOTH, "merged", "literature", text="and than that of the other", matched=("params",)),
        lower(CODE, "merged", "code", by=-0.1, text="it keeps most of what code taught", matched=("params",)),
        lower(LITERATURE, "merged", "literature", by=-0.1, text="and of what literature taught", matched=("params",)),
        lower(BOTH, "merged", "average", text="a scale of its own beats averaging", matched=("params",)),
        lower(BOTH, "merged", "joint", by=-0.1, text="it comes near training on both", matched=("params",)),
        lower(BOTH, "ties_0.5", "merged", text="less conflict, better models", matched=("params",)),
        within(BOTH, "dare_0.5", "merged", 0.02, text="half of the changes can be dropped", matched=("params",)),
        higher(BOTH, "dare_0.9_raw", "dare_0.9", text="if what stays is rescaled", matched=("params",)),
        higher(CODE, "forget_code_0.6", "pretrained", by=0.1, text="a negative scale forgets its task", matched=("params",)),
        lower(LITERATURE, "forget_code_0.3", "pretrained", by=-0.1, text="and little else", matched=("params",)),
        lower(BOTH, "three_merged", "three_average", text="of three tasks too", matched=("params",)),
        higher(
            BOTH, "strangers", "pretrained", by=0.5, text="models of different starts cannot be added up", matched=("params",)
        ),
        optimum(
            BOTH,
            {0.25: "scale_0.25", 0.5: "average", 0.75: "merged", 1.0: "scale_1", 1.5: "scale_1.5"},
            low=0.5,
            high=1.0,
            text="the best scale lies between the mean and the sum",
            matched=("params",),
        ),
    ),
    presets={
        "smoke": dataclasses.replace(SMOKE, arms={name: {"train.steps": 4, "optimizer.warmup_steps": 1} for name in SHORT}),
        "cpu": Preset(),
        # GPT-2 Large, trained on C4 and fine-tuned on the embedded text.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.pattern": ("dense",),
                "model.d_model": 1280,
                "model.num_layers": 36,
                **{f"model.blocks.dense.mixer.{key}": 20 for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn": {"kind": "ffn", "hidden": 5120},
                "data.name": "embedded_text",
                "data.domains": DOMAINS,
                "data.seq_len": 1024,
                "data.batch_size": 512,
                "train.steps": 300_000,
                "optimizer.learning_rate": 2.5e-4,
                "optimizer.warmup_steps": 2_000,
            },
            arms={
                "start": {"data.name": "c4", "data.domains": None},
                **{name: {"train.steps": 500, "optimizer.learning_rate": 1e-5} for name in SHORT if name != "start"},
            },
        ),
    },
    metrics=(CODE, LITERATURE),
    notes="Router state is that of the start. LoRA's factors are refused: only products add up.",
)
