"""Expert choice (Zhou et al. 2022): experts pick tokens, so load is balanced by construction and tokens get 0 to e experts.

Selection over a sequence sees its future, so the comparison is made where that is honest: classifying images, in which all
patches are given at once.
"""

from configs import base_vit
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, changes_less, higher, lower, trend

MOE = "model.blocks.moe.ffn"


def expert_choice(factor: float, **fields) -> dict:
    """Experts choose; no balance loss is needed."""
    return {
        f"{MOE}.select": {"kind": "expert_choice", "capacity_factor": factor, **fields},
        f"{MOE}.losses": {},
    }


def base():
    """The ViT on real digits; top-1 with as much room as expert choice has, and a balance loss, unless an arm says otherwise."""
    config = base_vit.get_config()
    config.model.blocks.moe.ffn.select.capacity_factor = 1.0
    config.model.blocks.moe.ffn.losses = {"balance": {"coef": 0.01}}
    config.data.batch_size = 32
    config.train = {"steps": 400, "accumulation": 1, "log_every": 20}
    config.eval = {"every": 50, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


# Room for all choices under perfect balance: 2 n / e slots an expert, which GShard calls a capacity factor of 2.
TOP2 = {f"{MOE}.select": {"kind": "top_k", "k": 2, "capacity_factor": 1.0, "normalise": True, "priority": "choice"}}

STUDY = Study(
    slug="expert_choice",
    title="Mixture-of-experts with expert choice routing",
    arxiv="2202.09368",
    implements=("moejax.ExpertChoice", "moejax.MoE"),
    full_size=1e9,
    departures=Departures(
        scale="a vision transformer on digits, where selection over all patches is honest, instead of a language model; 8 "
        "experts instead of 64",
        method="every other layer a mixture of plain instead of gated experts",
        left_out="at most two or three experts a token (EC-CAP), hash layers, fine-tuning on GLUE and SuperGLUE, time per step",
        capacity="the patches of one image compete, 16 of them; the paper, as the paper preset, mixes tokens of many sequences in a group. GShard's "
        "capacity factor 2 is 1 here, as room is counted per choice, and Switch has 1.0",
        optimizer="AdamW with a cosine instead of Adafactor; the paper preset, of ImageNet, is ours",
        decay="0.05 instead of Adafactor's none",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense", "dense")}, note="equal compute to top1 and ec1"),
        Arm("top1", note="Switch: token choice, k=1, as many slots as ec1"),
        Arm("top2", TOP2, note="GShard: token choice, k=2, as many slots as ec2"),
        Arm("ec1", expert_choice(1.0), note="expert choice, one expert per token on average"),
        Arm("ec2", expert_choice(2.0), note="expert choice, two experts per token on average (the paper's default)"),
    ),
    ablations={
        "capacity": (Arm("ec0.5", expert_choice(0.5)), Arm("ec4", expert_choice(4.0))),
        "experts": tuple(
            Arm(f"{name}_experts_{e}", {**rule, f"{MOE}.num_experts": e})
            for name, rule in (("ec2", expert_choice(2.0)), ("top2", TOP2))
            for e in (4, 16)
        ),
    },
    claims=(
        lower(
            "eval/loss",
            "ec2",
            "top2",
            headline=True,
            text="expert choice beats GShard's top-2 at equal compute",
            matched=("flops",),
        ),
        lower("eval/loss", "ec1", "top1", text="expert choice with one expert per token beats Switch", matched=("flops",)),
        higher("eval/stats/unrouted", "ec1", "top1", text="some tokens are picked by nobody", matched=("flops", "params")),
        lower(
            "eval/loss", "ec2", "dense", text="expert choice beats the dense model (at twice its expert compute)", matched=()
        ),
        lower("eval/loss", "ec0.5", "top1", text="half an expert per token on average still beats Switch", matched=("params",)),
        trend(
            "eval/loss",
            {4: "ec2_experts_4", 8: "ec2", 16: "ec2_experts_16"},
            high=0,
            log=True,
            text="more experts are better",
            matched=("flops",),
        ),
        changes_less(
            "eval/loss",
            ("ec2_experts_4", "ec2_experts_16"),
            ("top2_experts_4", "top2_experts_16"),
            text="and expert choice gains more from them than top-2",
            matched=("flops",),
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
                "model.d_model": 768,
                "model.num_layers": 12,
                **{f"model.blocks.{b}.mixer.num_heads": 12 for b in ("dense", "moe")},
                "model.blocks.dense.ffn.hidden": 3072,
                f"{MOE}.bank.hidden": 3072,
                f"{MOE}.num_experts": 64,
                f"{MOE}.group_by": "batch",
                "model.dtype": "bfloat16",
                "data.name": "imagenet2012",
                "data.batch_size": 4096,
                "train.steps": 90_000,
                "optimizer.warmup_steps": 10_000,
                "optimizer.learning_rate": 1e-3,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={f"{name}_experts_{e}": {f"{MOE}.num_experts": 8 * e} for name in ("ec2", "top2") for e in (4, 16)},
        ),
    },
    metrics=("eval/accuracy", "eval/stats/experts_per_token"),
)
