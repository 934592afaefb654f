"""Mixture of nested experts (Jain et al. 2024): each patch of an image uses an eighth, a quarter, half or all of one ViT's width.

Small ViTs on real digits, 16 patches of 2 x 2, widths 16, 32 and 64. `mone` starts as a MatFormer (one width for all patches, drawn each
step) and then spends half of the width on average; `half`, `matformer` and `mod` spend as much at inference, in their own ways.
Projections are what is saved: the products of attention itself cost all arms but `mod` the same. FLOPs of training count the widest
network that a step may draw, so they are equal among arms that begin as a MatFormer, and to `dense`; arms of one width from the first
step on train with about half of them.
"""

from configs import base_vit
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, higher, lower, within

BLOCK = "model.blocks.nested"
NORM = {"kind": "layer_norm"}
STEPS = 300


def mod(d_heads: int, hidden: int) -> dict:
    """Mixture-of-depths in every block, evaluated as it is trained: images need no causal rule."""
    dense = {"kind": "transformer", "norm": NORM, "mixer": {"kind": "attention", "num_heads": d_heads}}
    dense["ffn"] = {"kind": "ffn", "hidden": hidden}
    return {"kind": "mixture_of_depths", "capacity_factor": 0.5, "eval_select": "top_k", "remedy": None, "block": dense}


def base():
    """Four nested blocks of three experts, half of the width on average, the first half of training a MatFormer's."""
    config = base_vit.get_config()
    nested = {"kind": "nested", "num_heads": 4, "hidden": 128, "norm": NORM, "num_experts": 3, "budgets": (0.5,)}
    config.model.blocks = {
        "nested": {**nested, "pretrain_steps": STEPS // 2},
        "mod": mod(4, 128),
        "dense": config.model.blocks.dense.to_dict(),
    }
    config.model.pattern = ("nested",)
    config.train = {"steps": STEPS, "accumulation": 1, "log_every": 20}
    config.eval = {"every": 0, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


def shares(*capacities: float, pretrain_steps: int = 0) -> dict:
    """Fixed shares of the tokens, narrowest expert first."""
    return {f"{BLOCK}.capacities": capacities, f"{BLOCK}.pretrain_steps": pretrain_steps}


def program(**fields) -> dict:
    """Fields of the nested blocks."""
    return {f"{BLOCK}.{name}": value for name, value in fields.items()}


STUDY = Study(
    slug="mone_nested",
    title="Mixture of nested experts: adaptive processing of visual tokens",
    arxiv="2407.19985",
    implements=(
        "moejax.Nested",
        "moejax.layers.depth.nested_budget.budget_capacities",
        "moejax.layers.depth.nested_budget.expert_preferred",
    ),
    departures=Departures(
        scale="digits, 300 steps and three experts; the paper's models see ImageNet-21k and video",
        method="the MatFormer's steps and those of the nested experts are the halves of one run, where the paper starts from a "
        "trained model; which layer's tokens the router reads and where alpha lives are the card's reading of third-party "
        "code",
        left_out="video",
        capacity="none",
        optimizer="AdamW with a cosine here, the inverse square root in the paper preset",
        decay="0.05 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("dense", shares(0.0, 0.0, 1.0), note="all patches at full width"),
        Arm("half", shares(0.0, 1.0, 0.0), note="all patches at half of the width: equal FLOPs to mone"),
        Arm("mod", {"model.pattern": ("mod",)}, note="each block takes half of the patches"),
        Arm("mone", note="half of the width on average"),
        Arm("random", program(choice="random"), note="mone with random experts"),
    ),
    ablations={
        "matformer": (
            Arm("matformer", shares(0.0, 1.0, 0.0, pretrain_steps=STEPS), note="drawn widths, evaluated at half"),
            Arm("no_pretraining", program(pretrain_steps=0), note="mone from the first step"),
        ),
        "budget": tuple(Arm(f"mone_{b:g}", program(budgets=(b,))) for b in (0.3, 0.4, 0.65)),
        "adaptive": tuple(
            Arm(
                f"adaptive_{b:g}",
                program(budgets=(0.3, 0.5, 0.65, 1.0), eval_budget=b),
                note=f"all budgets, evaluated at {b:g}",
            )
            for b in (0.3, 0.5, 1.0)
        ),
        "program": (
            Arm("all_or_nothing", shares(2 / 3, 0.0, 1 / 3, pretrain_steps=STEPS // 2), note="the middle expert gets nobody"),
            Arm("beta_1", program(beta=1.0), note="more extreme shares"),
            Arm("delta_4", program(delta=4.0), note="wide experts are worth more"),
        ),
        "position": (
            Arm("late_router", {"model.pattern": ("dense", "nested", "nested", "nested")}, note="decided after a dense block"),
        ),
    },
    claims=(
        within(
            "eval/accuracy",
            "mone",
            "dense",
            0.02,
            headline=True,
            text="half of the width is as accurate as all of it",
            matched=("flops", "params"),
        ),
        higher(
            "eval/accuracy",
            "mone",
            "mod",
            text="a narrow expert is better than none, at equal FLOPs of inference",
            matched=("params",),
        ),
        higher(
            "eval/accuracy",
            "mone",
            "half",
            text="choosing widths beats one width for all, at equal FLOPs of inference",
            matched=("params",),
        ),
        higher("eval/accuracy", "mone", "matformer", text="it beats the MatFormer at equal FLOPs", matched=("flops",)),
        higher("eval/accuracy", "mone", "random", text="learned experts beat random ones", matched=("flops", "params")),
        within(
            "eval/accuracy", "adaptive_0.5", "mone", 0.02, text="one model serves several budgets", matched=("flops", "params")
        ),
        lower("eval/loss", "mone", "all_or_nothing", text="all-or-nothing capacities are worse", matched=("flops", "params")),
        within(
            "eval/accuracy",
            "adaptive_0.3",
            "mone_0.3",
            0.02,
            text="at a lower budget too it is close to the model of that budget",
            matched=("flops", "params"),
        ),
        higher(
            "eval/accuracy",
            "mone",
            "late_router",
            text="the first layer is the best place to decide",
            matched=("params",),
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
                "model.d_model": 1024,
                "model.num_layers": 24,
                "model.blocks.dense.mixer.num_heads": 16,
                "model.blocks.dense.ffn.hidden": 4096,
                "model.blocks.mod": mod(16, 4096),
                **program(num_heads=16, hidden=4096, num_experts=4, pretrain_steps=45_000),
                "model.dtype": "bfloat16",
                "model.remat": "full",
                "data.name": "imagenet2012",
                "data.batch_size": 4096,
                "train.steps": 90_000,
                "train.log_every": 100,
                "optimizer.warmup_steps": 10_000,
                "optimizer.learning_rate": 1e-3,
                "optimizer.schedule": "rsqrt",
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                "dense": shares(0.0, 0.0, 0.0, 1.0),
                "half": shares(0.0, 0.0, 1.0, 0.0),
                "matformer": shares(0.0, 0.0, 1.0, 0.0, pretrain_steps=90_000),
                "all_or_nothing": shares(4 / 7, 0.0, 0.0, 3 / 7, pretrain_steps=45_000),
            },
        ),
    },
    metrics=("eval/stats/width", "eval/loss"),
)
