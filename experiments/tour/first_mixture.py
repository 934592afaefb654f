"""A first mixture: what experts buy at equal compute, on a laptop, in minutes.

Byte language models on three domains of real text (Python code, reference prose, literary prose). A token computes the same in
`dense`, `switch8` and, up to its second expert, in `top2`; `wide` is a dense model that computes as much as `top2`.

    make demo        or        python -m experiments.run
"""

from configs import base_lm
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
WIDE = {**base().model.blocks.dense.to_dict(), "ffn": {"kind": "glu", "hidden": 256}}

STUDY = Study(
    slug="first_mixture",
    title="A first mixture: dense, Switch, dropless top-2 and a wider dense model",
    arxiv="2101.03961",
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense", "dense")}, note="the same compute per token as switch8"),
        Arm("switch8", note="8 experts, top-1, capacity factor 1.25"),
        Arm(
            "top2",
            {f"{MOE}.select": {"kind": "top_k", "k": 2, "normalise": True}},
            note="8 experts, top-2, dropless: computes as much as wide",
        ),
        Arm(
            "wide",
            {"model.pattern": ("dense", "wide"), "model.blocks.wide": WIDE},
            note="dense, with every other feed-forward layer twice as wide",
        ),
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
        "cpu": Preset(),
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
            arms={
                "wide": {
                    "model.blocks.wide.ffn.hidden": 4096,
                    **{f"model.blocks.wide.mixer.{key}": heads for key, heads in HEADS.items()},
                }
            },
        ),
    },
    metrics=("eval/code/bits_per_byte", "eval/reference/bits_per_byte", "eval/literature/bits_per_byte"),
)
