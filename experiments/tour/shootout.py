"""The shootout: token choice, expert choice and soft mixtures on one backbone, ranked. A study that no paper has.

A small ViT on MNIST (16 patches of 7 x 7), every other layer a mixture. All arms have the same data, the same steps, 1,024 hidden
units of experts in each mixture layer, and, as far as a method lets one choose, 128 of them active per token (the table's
'active' says what each really used). Soft slots, merged experts and
expert choice see all tokens of an image; the others decide token by token. Capacity and assignment are over the batch, as in V-MoE:
the patches of one image look so much alike that a capacity for each image refuses more than half of all choices.

    python -m experiments.run --study=shootout
"""

from collections.abc import Mapping
from typing import Any

from configs import base_vit
from experiments.overrides import flatten
from experiments.study import SMOKE, Arm, Preset, Study, lower

ACTIVE, TOTAL = 128, 1024
BALANCE = {"balance": {"coef": 0.01, "over": "batch"}}
TOP2 = {"kind": "top_k", "k": 2, "normalise": True}


def moe(num_experts: int, select: dict[str, Any], losses: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A mixture in every other layer: `num_experts` experts that together have the total width."""
    ffn = {
        "kind": "moe",
        "num_experts": num_experts,
        "router": {"kind": "linear"},
        "bank": {"kind": "ffn", "hidden": TOTAL // num_experts},
        "select": select,
        "losses": BALANCE if losses is None else losses,
        **fields,
    }
    return layer(ffn)


def layer(ffn: dict[str, Any]) -> dict[str, Any]:
    """Any feed-forward layer in its place."""
    return {"model.blocks.moe.ffn": ffn}


def wide(kind: str, num_experts: int, **fields: Any) -> dict[str, Any]:
    """A layer with a bank of its own kind of routing."""
    return layer({"kind": kind, "num_experts": num_experts, "bank": {"kind": "ffn", "hidden": TOTAL // num_experts}, **fields})


def base():
    """Four layers of width 64, the second and the fourth mixtures."""
    config = base_vit.get_config()
    config.model.image_size, config.model.patch_size = 28, 7
    config.model.pattern = ("dense", "moe")
    config.data = {"name": "embedded_mnist", "batch_size": 64}
    config.optimizer.warmup_steps = 30
    config.train = {"steps": 300, "accumulation": 1, "log_every": 20}
    config.eval = {"every": 0, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


DENSE = ("dense",)
SIGMOID = {"kind": "top_k", "k": 2, "score": "sigmoid", "normalise": True}

SCALE = 12  # of all hidden widths at the paper scale: 1,536 active, as in a ViT-S


def widened(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The arm's hidden widths at the paper scale."""
    flat = flatten(overrides)
    return {key: SCALE * value for key, value in flat.items() if key.endswith(".hidden")}


ARMS = (
    Arm("dense", {"model.pattern": DENSE}, note="equal active width"),
    Arm(
        "dense_wide",
        {"model.pattern": DENSE, "model.blocks.dense.ffn.hidden": TOTAL // 2},
        note="about equal parameters: a bound",
    ),
    Arm("random", moe(16, TOP2, {}, router={"kind": "random"}), note="two random experts of 16"),
    Arm(
        "switch",
        moe(8, {"kind": "top_k", "k": 1, "capacity_factor": 1.25}, group_by="batch"),
        note="one of 8, capacity 1.25",
    ),
    Arm("top2", moe(16, TOP2), note="two of 16, dropless"),
    Arm(
        "gshard",
        moe(16, {"kind": "gshard", "capacity_factor": 1.25}, group_by="batch"),
        note="two of 16, random second, capacity 1.25",
    ),
    Arm(
        "fine_shared",
        moe(31, {"kind": "top_k", "k": 3}, shared={"kind": "ffn", "hidden": 32}, bank={"kind": "ffn", "hidden": 32}),
        note="three of 31 fine experts and a shared one (DeepSeekMoE)",
    ),
    Arm("sigmoid", moe(16, SIGMOID), note="normalised sigmoid gates"),
    Arm(
        "sigma",
        moe(
            16,
            {"kind": "expert_dropout", "rate": 0.05, "select": {"kind": "top_k", "k": 2, "score": "sigmoid"}},
            {"spread": {"coef": 1e-3}},
            router={"kind": "equal_norm"},
            bank={
                "kind": "ffn",
                "hidden": TOTAL // 16,
                "activation": "relu",
                "init_in": {"kind": "dense_matched"},
                "init_out": {"kind": "dense_matched", "fan_in": "all"},
            },
        ),
        note="sigmoid gates as they are, started as the dense layer is (sigma-MoE)",
    ),
    Arm("loss_free", moe(16, SIGMOID, {}, balancer={"kind": "loss_free", "speed": 1e-2}), note="balanced by a bias, no loss"),
    Arm(
        "base",
        moe(
            8, {"kind": "balanced_assignment"}, {}, eval_select={"kind": "top_k", "k": 1, "score": "sigmoid"}, group_by="batch"
        ),
        note="balanced assignment in training, greedy after",
    ),
    Arm(
        "top_p",
        moe(
            16,
            {"kind": "top_p", "p": 0.25},
            {"balance": {"coef": 0.01, "share": "tokens", "over": "batch"}, "entropy": {"coef": 0.01}},
        ),
        note="experts until their probabilities sum to 0.25",
    ),
    Arm(
        "null_experts",
        moe(16, {"kind": "null_experts", "k": 4, "num_null": 16}, {"null_balance": {"coef": 0.01}}),
        note="four of 16 real and 16 null experts: two on average (AdaMoE)",
    ),
    Arm(
        "relu",
        moe(16, {"kind": "relu", "k": 2.0}, {"adaptive_l1": {"coef": 1e-4, "k": 2.0, "rate": 1.2}}),
        note="ReLU gates, two on average (ReMoE)",
    ),
    Arm(
        "top_any",
        moe(
            16,
            {"kind": "top_any"},
            {},
            router={
                "kind": "expert_pool",
                "initial": 16,
                "scale_init": 10.0,
                "learn_scale": True,
                "diversity": 1e-2,
                "cycle": 60,
            },
        ),
        note="all experts over a learned threshold (DynMoE)",
    ),
    Arm("recurrent", moe(16, TOP2, router={"kind": "recurrent", "width": 32}), note="a router with memory over depth (RMoE)"),
    Arm(
        "codes",
        wide("vq_moe", 16, router={"kind": "linear"}, select={"kind": "top_k", "k": 1}, losses=BALANCE),
        note="one of 16, and the one that its code names (VQMoE)",
    ),
    Arm(
        "chain",
        wide(
            "chain_of_experts",
            16,
            iterations=2,
            router={"kind": "linear"},
            select={"kind": "top_k", "k": 1},
            losses=BALANCE,
        ),
        note="one of 16, then one more, on what the first made",
    ),
    Arm(
        "compete",
        wide("competition", 16, k=2, warmup=15, router={"kind": "linear"}, losses=BALANCE),
        note="CompeteSMoE, two of 16",
    ),
    Arm(
        "expert_choice",
        moe(8, {"kind": "expert_choice", "capacity_factor": 1.0}, {}),
        note="experts choose tokens: one of 8 a token on average",
    ),
    Arm(
        "merged",
        wide("smear", 8),
        note="8 experts averaged for each image (SMEAR)",
    ),
    Arm(
        "soft",
        layer({"kind": "soft_moe", "num_experts": 8, "slots": 2, "bank": {"kind": "ffn", "hidden": 124}}),
        note="8 experts of 2 slots, narrower by what finding and mixing tokens costs",
    ),
)

STUDY = Study(
    slug="shootout",
    full_size=5e7,
    title="Shootout: token choice, expert choice and soft mixtures at equal compute",
    arxiv="",
    departures=None,
    base=base(),
    arms=ARMS,
    claims=(
        lower(
            "eval/loss", "top2", "dense", headline=True, text="a token-choice mixture beats its dense twin", matched=("flops",)
        ),
        lower("eval/loss", "top2", "random", text="a learned router beats a random one", matched=("flops", "params")),
        lower("eval/loss", "soft", "top2", text="soft slots beat token choice", matched=("flops", "params")),
        lower("eval/loss", "expert_choice", "top2", text="expert choice beats token choice", matched=("flops", "params")),
        lower("eval/loss", "soft", "expert_choice", text="soft slots beat expert choice", matched=("flops",)),
        lower("eval/loss", "loss_free", "sigmoid", text="a bias costs less than a balance loss", matched=("flops", "params")),
        lower(
            "eval/loss",
            "fine_shared",
            "top2",
            text="fine experts with a shared one beat coarse ones",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                "model.image_size": 224,
                "model.channels": 3,
                "model.patch_size": 16,
                "model.num_classes": 1000,
                "model.d_model": 384,
                "model.num_layers": 12,
                "model.dtype": "bfloat16",
                "model.remat": "full",
                "data.name": "imagenet2012",
                "data.batch_size": 4096,
                "optimizer.learning_rate": 1e-3,
                "optimizer.warmup_steps": 10_000,
                "train.steps": 90_000,
                "train.log_every": 100,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
                "model.blocks.dense.ffn.hidden": SCALE * ACTIVE,
            },
            arms={arm.name: widened(arm.overrides) for arm in ARMS},
        ),
    },
    metrics=("eval/accuracy", "eval/stats/experts_per_token"),
)
