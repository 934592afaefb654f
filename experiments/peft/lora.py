"""LoRA (Hu et al. 2021), with rsLoRA's scale (Kalajdzievski 2023) and DoRA's magnitudes (Liu et al. 2024).

A byte language model learns literature, is frozen, and its attention is adapted to code with matrices of low rank; `full` trains all of it
further, `frozen` none of it. All arms start from the same run, one for each seed.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower, within

QV, LINEAR = ("*/q", "*/v"), ("*/q", "*/k", "*/v", "*/o")
START = {"init.source": {"kind": "run", "arm": "literature"}}
FULL, ADAPTED = {"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.0}


def adapted(rank: int, alpha: float = 16.0, kind: str = "lora", targets: tuple[str, ...] = QV) -> dict:
    """Trains adapters alone. `alpha / rank` is LoRA's and DoRA's scale; rsLoRA divides by the root itself."""
    scale = alpha if kind == "rs_lora" else alpha / rank
    adapters = {"main": {"kind": kind, "rank": rank, "scale": scale, "targets": targets}}
    return {**START, **ADAPTED, "adapters": adapters, "trainable": {"adapters": {}}}


def base():
    """Four dense layers on code."""
    config = small_lm.get_config()
    config.model.pattern = ("dense",)
    config.data.domains = ("code",)
    return config


STUDY = Study(
    slug="lora",
    title="LoRA: low-rank adaptation, with rsLoRA and DoRA",
    arxiv="2106.09685",
    implements=("moejax.LoRA", "moejax.RSLoRA", "moejax.DoRA", "moejax.Adapted"),
    departures=Departures(
        scale="a small model on bytes, from literature to code, instead of RoBERTa and GPT on language understanding and "
        "generation",
        method="alpha is 16 for all ranks",
        left_out="GPT-3, merging (a test), LoRA+ and PiSSA",
        capacity="none",
        optimizer="one rate for `full` and ten times that for adapters, as practice has it; the paper tunes both",
        decay="none on adapters, 0.1 on what is trained in full; the paper's differs by task",
        init="none",
    ),
    base=base(),
    starts=(Arm("literature", {"data.domains": ("literature",)}, note="what all arms start from"),),
    arms=(
        Arm("frozen", {**START, "train.steps": 0, "optimizer.warmup_steps": 0}, note="the start as it is"),
        Arm("full", {**START, **FULL}, note="all parameters train further"),
        Arm("lora4", adapted(4), note="rank 4 on queries and values"),
        Arm("dora4", adapted(4, kind="dora"), note="lora4 with magnitudes"),
    ),
    ablations={
        "rank": tuple(Arm(f"lora{r}", adapted(r), note=f"rank {r}, alpha / r") for r in (1, 16, 64))
        + tuple(Arm(f"rs_lora{r}", adapted(r, kind="rs_lora"), note=f"rank {r}, alpha / sqrt(r)") for r in (4, 16, 64)),
        "targets": (
            Arm("lora_q", adapted(7, targets=("*/q",)), note="rank 7 on queries: the parameters of lora4"),
            Arm("lora2_qkvo", adapted(2, targets=LINEAR), note="rank 2 on all four matrices"),
        ),
        "magnitude": (Arm("dora2", adapted(2, kind="dora"), note="half of dora4's rank"),),
    },
    claims=(
        within(
            "eval/bits_per_byte",
            "lora4",
            "full",
            0.1,
            headline=True,
            text="rank 4 on two matrices a layer comes close to training everything",
            matched=(),
        ),
        lower("eval/bits_per_byte", "lora4", "frozen", text="the adapter learns", matched=("params",)),
        lower("eval/bits_per_byte", "dora4", "lora4", text="magnitudes help at equal rank", matched=("params",)),
        within("eval/bits_per_byte", "lora1", "lora4", 0.05, text="rank 1 is nearly enough", matched=("params",)),
        within("eval/bits_per_byte", "lora64", "lora16", 0.02, text="under alpha / r, more rank gains nothing", matched=()),
        lower("eval/bits_per_byte", "rs_lora64", "rs_lora4", text="under alpha / sqrt(r), more rank gains", matched=()),
        lower(
            "eval/bits_per_byte",
            "lora4",
            "lora_q",
            text="two matrices beat one of as many parameters in a higher rank",
            matched=("trainable_params",),
        ),
        within(
            "eval/bits_per_byte",
            "lora2_qkvo",
            "lora4",
            0.05,
            text="four matrices of rank 2 match two of rank 4",
            matched=("trainable_params",),
        ),
        lower("eval/bits_per_byte", "dora2", "lora4", text="DoRA beats LoRA at half the rank", matched=()),
        higher("eval/bits_per_byte", "frozen", "full", by=0.1, text="there is a gap to adapt to", matched=("params",)),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # GPT-2 medium's size, as a decoder with rotary positions.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 24,
                "model.blocks.dense.mixer.num_heads": 16,
                "model.blocks.dense.mixer.num_kv_heads": 16,
                "model.blocks.dense.ffn.hidden": 2816,
                "data.seq_len": 1024,
                "data.batch_size": 64,
                "train.steps": 20_000,
                "optimizer.warmup_steps": 500,
            },
            # Values are as wide as queries there, so that the rank of as many parameters is 8.
            arms={"lora_q": {"adapters.main.rank": 8, "adapters.main.scale": 2.0}},
        ),
    },
    notes="A recipe of the paper preset's data (one corpus for the start, another for the adaptation) is ours: it has one corpus, C4.",
)
