"""Sparse upcycling (Komatsuzaki et al. 2022): a trained dense model becomes a mixture of copies of itself and is trained on.

Byte language models. A dense one is trained at a constant rate; what continues it trains half as long again at a rate that falls linearly
from there, without a new warm-up. Every other feed-forward layer becomes 8 experts, two per token, without drops. Two experts compute
more than one layer, so the dense model that is merely continued trains for as many FLOPs.
"""

import dataclasses

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, within

FFN = "model.blocks.moe.ffn"
DENSE = {FFN: {"kind": "glu", "hidden": 128}}
SOURCE = {"init.source": {"kind": "run", "arm": "dense"}}
# Top-2 of the width of the dense layer, in every other layer: 1.255 times the FLOPs of the dense model of width 64.
LONGER = 1885


def begun(surgeries: dict, order: tuple[str, ...] = (), **more) -> dict:
    """From the dense model, by surgeries."""
    return {**SOURCE, "init.surgeries": surgeries, "init.order": order, **more}


def upcycled(noise: float = 0.0, **more) -> dict:
    surgeries = {"upcycle": {"noise": noise} if noise else {}, "extend": {"paths": ("*/router",)}}
    return begun(surgeries, ("upcycle", "extend"), **more)


RAW = {f"{FFN}.select.normalise": False}
STILL = {"train.steps": 0}
# The schedule of what begins untrained.
WARM = {"optimizer.warmup_steps": 100}
RANDOM = {"keep": {"without": ("*/1_moe/ffn/expert",)}, "extend": {"paths": ("*/bank", "*/router")}}


def base():
    """The mixture, as it is continued."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.bank.hidden = 128
    ffn.router = {"kind": "linear", "init_w": {"kind": "normal", "std": 0.02}}
    config.optimizer.warmup_steps, config.optimizer.schedule = 0, "linear"
    config.train.steps = 1500
    return config


def scaled(steps: int, factor: float, warmup: int) -> dict:
    """Steps of the arms that do not take those of the preset: the dense start twice as many, FLOPs made equal by `factor`."""
    long = {name: {"train.steps": 3 * steps, "optimizer.warmup_steps": warmup} for name in ("scratch_long",)}
    return {
        "dense": {"train.steps": 2 * steps, "optimizer.warmup_steps": warmup},
        "dense_continued": {"train.steps": round(factor * steps)},
        "scratch": {"optimizer.warmup_steps": warmup},
        **long,
    }


STUDY = Study(
    slug="sparse_upcycling",
    title="Sparse upcycling: mixtures from dense checkpoints",
    arxiv="2212.05055",
    implements=("moejax.Upcycle",),
    departures=Departures(
        scale="a decoder on bytes, in thousands of steps, instead of T5 and ViT; 8 experts instead of 32",
        method="none",
        left_out="resuming Adam's moments (in language the paper finds no use in it), expert choice in encoders and vision, more "
        "mixture layers, which would be stacked otherwise, and depth tiling. The second run reads the rows of the first "
        "again",
        capacity="nothing is dropped but in 'drops', where the paper has a capacity factor of 2",
        optimizer="AdamW instead of Adafactor; the dense run is at a constant rate and what follows falls from it linearly, where "
        "the paper continues an inverse square root: schedules of this library count a run's own steps",
        decay="0.1; Adafactor has none",
        init="none",
    ),
    base=base(),
    arms=(
        Arm(
            "dense",
            {**DENSE, **WARM, "optimizer.schedule": "constant", "train.steps": 3000},
            note="what all others but scratch begin with",
        ),
        Arm("dense_continued", {**DENSE, **SOURCE, "train.steps": LONGER}, note="for as many FLOPs as upcycled"),
        Arm("upcycled", upcycled(), note="8 copies, two per token, weights that sum to 1"),
        Arm("upcycled_raw", upcycled(**RAW), note="weights are softmax probabilities over all experts"),
        Arm("scratch", WARM, note="the mixture untrained, for the extra steps alone"),
    ),
    ablations={
        "start": (
            Arm("upcycled_start", upcycled(**STILL), note="not trained on"),
            Arm("upcycled_raw_start", upcycled(**RAW, **STILL), note="not trained on"),
        ),
        "budget": (
            Arm("scratch_long", {**WARM, "train.steps": 4500}, note="untrained, for the steps of dense and upcycled together"),
        ),
        "copies": (
            Arm("random_experts", begun(RANDOM, ("keep", "extend")), note="fresh experts in the trained model"),
            Arm("noisy", upcycled(noise=0.1), note="copies with noise of a tenth of their spread"),
        ),
        "experts": tuple(Arm(f"experts_{e}", upcycled(**{f"{FFN}.num_experts": e})) for e in (4, 16)),
        "rate": (
            Arm("warm_again", upcycled(**WARM, **{"optimizer.learning_rate": 8e-3}), note="a new warm-up to twice the rate"),
        ),
        "drops": (Arm("capacity_1", upcycled(**{f"{FFN}.select.capacity_factor": 1.0}), note="room for the mean load only"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "upcycled",
            "dense_continued",
            headline=True,
            text="upcycling beats training the dense on",
            matched=("compute",),
        ),
        lower(
            "eval/bits_per_byte",
            "upcycled",
            "scratch",
            text="and a mixture from scratch with the same steps",
            matched=("flops", "params"),
        ),
        higher(
            "eval/bits_per_byte",
            "upcycled_raw_start",
            "dense",
            by=0.05,
            text="with weights that do not sum to 1 it does not start as the dense model",
            matched=(),
        ),
        lower(
            "eval/bits_per_byte",
            "upcycled_raw",
            "upcycled",
            text="in language these are better in the end",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "scratch_long", "upcycled", text="with the whole budget scratch catches up", matched=()),
        lower(
            "eval/bits_per_byte",
            "upcycled",
            "random_experts",
            by=0.05,
            text="copies beat random experts",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte", "noisy", "upcycled", 0.02, text="noise on copies brings nothing", matched=("flops", "params")
        ),
        lower("eval/bits_per_byte", "experts_16", "experts_4", text="more experts are better", matched=("flops",)),
        higher(
            "eval/bits_per_byte", "warm_again", "upcycled", text="warming up again costs quality", matched=("flops", "params")
        ),
        lower(
            "eval/bits_per_byte",
            "upcycled",
            "capacity_1",
            text="tokens without room lose what the dense model gave them: more room is better",
            matched=("params",),
        ),
    ),
    presets={
        "smoke": dataclasses.replace(SMOKE, arms={**scaled(4, 1.25, 1), "warm_again": {"optimizer.warmup_steps": 1}}),
        "cpu": Preset(),
        # T5 Base as a decoder: 24 layers, of which every second one becomes 32 experts.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 768,
                "model.num_layers": 24,
                **{f"model.blocks.{b}.mixer.{key}": 12 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 2048,
                f"{FFN}.bank.hidden": 2048,
                f"{FFN}.num_experts": 32,
                "data.seq_len": 512,
                "data.batch_size": 512,
                "train.steps": 500_000,
                "optimizer.learning_rate": 1e-3,
            },
            arms={
                **{
                    name: {f"{FFN}.hidden": 2048, **fields}
                    for name, fields in scaled(500_000, 1.27, 10_000).items()
                    if name.startswith("dense")
                },
                **{name: fields for name, fields in scaled(500_000, 1.27, 10_000).items() if name.startswith("scratch")},
                "warm_again": {"optimizer.warmup_steps": 10_000, "optimizer.learning_rate": 2e-3},
            },
        ),
    },
    metrics=("eval/stats/max_violation", "eval/stats/drop_rate"),
)
