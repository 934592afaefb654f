"""A first mixture: what experts buy at equal compute, on a laptop, in minutes.

Byte language models on three domains of real text (Python code, reference prose, literary prose). `dense` computes as much as
`switch8`, and `wide` as much as `top2`.

    make demo        or        python -m experiments.run
"""

from configs import base_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, below, lower

MOE = "model.blocks.moe.ffn"


def base():
    """The base language model at half its width, depth and context."""
    config = base_lm.get_config()
    config.model.d_model = 64
    config.model.num_layers = 2
    for block in config.model.blocks.values():
        block.mixer.num_heads, block.mixer.num_kv_heads = 2, 1
    config.model.blocks.dense.ffn.hidden = 128
    config.model.blocks.moe.ffn.bank.hidden = 128
    config.data.seq_len = 128
    config.optimizer.learning_rate = 5e-3
    config.train = {"steps": 160, "accumulation": 1, "log_every": 10}
    config.eval = {"every": 40, "batches": 8, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


HEADS = {"num_heads": 12, "num_kv_heads": 12}


def twin(hidden: int) -> dict:
    """Dense, and where the mixtures have their experts as wide as they compute for each token."""
    block = {**base().model.blocks.dense.to_dict(), "ffn": {"kind": "glu", "hidden": hidden}}
    return {"model.pattern": ("dense", "twin"), "model.blocks.twin": block}


def full_size(hidden: int) -> dict:
    """Overrides of a twin at the paper's scale."""
    return {"model.blocks.twin.ffn.hidden": hidden, **{f"model.blocks.twin.mixer.{key}": heads for key, heads in HEADS.items()}}


STUDY = Study(
    slug="first_mixture",
    title="A first mixture: dense, Switch, dropless top-2 and a wider dense model",
    arxiv="2101.03961",
    departures=Departures(
        scale="a demonstration on bytes in 160 steps, and no reproduction of Switch; the paper preset is ours",
        method="gated experts instead of ReLU ones",
        left_out="all of the paper's claims but that of equal compute",
        capacity="1.25 in evaluation too, where Switch has 2.0",
        optimizer="AdamW with a cosine instead of Adafactor",
        decay="0.1; Adafactor has none",
        init="routers start as all else, and not ten times smaller",
    ),
    base=base(),
    arms=(
        Arm("dense", twin(160), note="as wide as an expert and the empty slots that it computes: 1.25 times 128"),
        Arm("switch8", note="8 experts, top-1, capacity factor 1.25"),
        Arm(
            "top2",
            {f"{MOE}.select": {"kind": "top_k", "k": 2, "normalise": True}},
            note="8 experts, top-2, dropless: computes as much as wide",
        ),
        Arm("wide", twin(256), note="dense, as wide as two experts"),
    ),
    claims=(
        lower(
            "eval/bits_per_byte",
            "switch8",
            "dense",
            headline=True,
            text="8 experts, one per token, beat the dense model of equal compute",
            matched=("flops",),
        ),
        lower(
            "eval/bits_per_byte",
            "top2",
            "wide",
            text="two dropless experts beat the dense model of equal compute",
            matched=("flops",),
        ),
        lower(
            "eval/bits_per_byte", "top2", "switch8", text="two experts per token beat one (and cost more)", matched=("params",)
        ),
        below(
            "eval/stats/max_violation",
            "switch8",
            1.0,
            text="no expert of switch8 carries twice its share: routing has not collapsed",
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(looks=(4,), headline_looks=(4, 6)),  # minutes
        "paper": Preset(
            {
                "model.d_model": 768,
                "model.num_layers": 12,
                "model.blocks.dense.ffn.hidden": 2048,
                "model.blocks.moe.ffn.bank.hidden": 2048,
                **{f"model.blocks.{b}.mixer.{key}": heads for b in ("dense", "moe") for key, heads in HEADS.items()},
                "data.seq_len": 1024,
                "train.steps": 50_000,
            },
            arms={"dense": full_size(2560), "wide": full_size(4096)},
        ),
    },
    metrics=("eval/code/bits_per_byte", "eval/reference/bits_per_byte", "eval/literature/bits_per_byte"),
)
