"""Soft MoE (Puigcerver et al. 2023): every slot averages all tokens, every token averages all slots.

A small ViT on real digits: 16 patches, and as many slots, of 8 experts. Token choice and expert choice have as much room and run at the
same compute.
"""

from configs import base_vit
from experiments.departures import Departures
from experiments.quantities import lowest, mean
from experiments.study import SMOKE, Arm, Preset, Study, higher, lower, trend

MOE = "model.blocks.moe.ffn"
HIDDEN = 112  # less than the 128 of other experts, by what finding and mixing tokens costs


def soft(num_experts: int, slots: int, hidden: int = HIDDEN, **fields) -> dict:
    """A Soft MoE layer in place of the sparse one."""
    bank = {"kind": "ffn", "hidden": hidden}
    return {MOE: {"kind": "soft_moe", "num_experts": num_experts, "slots": slots, "bank": bank, **fields}}


def base():
    """Dense first half, mixture in the second half, as in the paper."""
    config = base_vit.get_config()
    config.model.pattern = ("dense", "dense", "moe", "moe")
    config.model.blocks.moe.ffn.select.capacity_factor = 1.0
    config.model.blocks.moe.ffn.losses = {"balance": {"coef": 0.01}}
    config.data.batch_size = 32
    config.train = {"steps": 400, "accumulation": 1, "log_every": 20}
    config.eval = {"every": 50, "batches": 0, "split": "validation"}
    config.checkpoint = {"every": 0, "keep": 1, "asynchronous": True}
    return config


STUDY = Study(
    slug="soft_moe",
    title="From sparse to soft mixtures of experts",
    arxiv="2308.00951",
    implements=("moejax.SoftMoE", "moejax.SoftSlots"),
    full_size=1e10,
    departures=Departures(
        scale="digits, 16 patches and 8 experts of two slots; the paper pretrains on JFT, and the paper preset on ImageNet",
        method="two slots an expert here, one in the paper",
        left_out="contrastive training of images with text, long training, and time of inference",
        capacity="the sparse arms choose within one image, with the capacity factor 1.0: as much room as soft slots have",
        optimizer="AdamW with a cosine here, the inverse square root in the paper preset, without the paper's cooldown",
        decay="0.05 in both presets; the paper's is not known to us",
        init="none",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense", "dense", "dense", "dense")}, note="equal compute"),
        Arm("token_choice", note="top-1 of 8, capacity factor 1, balance 0.01"),
        Arm(
            "expert_choice",
            {f"{MOE}.select": {"kind": "expert_choice", "capacity_factor": 1.0}, f"{MOE}.losses": {}},
            note="8 experts, one per token on average",
        ),
        Arm("soft", soft(8, 2), note="8 experts of 2 slots"),
        Arm("uniform", soft(8, 2, dispatch="uniform", combine="uniform"), note="the same experts, uniform mixing"),
    ),
    ablations={
        "slots": (Arm("soft_16x1", soft(16, 1)), Arm("soft_4x4", soft(4, 4)), Arm("soft_2x8", soft(2, 8))),
        "routing": (
            Arm("soft_dispatch_only", soft(8, 2, combine="uniform")),
            Arm("soft_combine_only", soft(8, 2, dispatch="uniform")),
        ),
        "normalisation": (
            Arm("no_normalisation", soft(8, 2, normalise=False), note="hurts at large widths only, says the paper"),
        ),
    },
    claims=(
        lower(
            "eval/loss",
            "soft",
            "token_choice",
            headline=True,
            text="Soft MoE beats token choice at equal compute",
            matched=("flops",),
        ),
        lower("eval/loss", "soft", "expert_choice", text="Soft MoE beats expert choice at equal compute", matched=("flops",)),
        lower("eval/loss", "soft", "dense", text="Soft MoE beats the dense model of equal compute", matched=("flops",)),
        lower("eval/loss", "soft", "uniform", text="learned mixing beats uniform mixing", matched=("flops", "params")),
        higher("eval/accuracy", "soft", "dense", text="Soft MoE classifies better than the dense model", matched=("flops",)),
        trend(
            "eval/loss",
            {2: "soft_2x8", 4: "soft_4x4", 16: "soft_16x1"},
            high=0,
            log=True,
            text="with as many slots, more experts are better: one slot for each is best",
            matched=("flops",),
        ),
        lower(
            "eval/loss",
            "soft",
            lowest("soft_dispatch_only", "soft_combine_only"),
            text="both softmaxes are needed",
            matched=("flops", "params"),
        ),
        lower(
            "eval/loss",
            mean("soft_dispatch_only", "soft_combine_only"),
            "uniform",
            text="and each is worth something",
            matched=("flops", "params"),
        ),
        lower(
            "eval/loss",
            "soft",
            "no_normalisation",
            text="without normalisation wide models do worse",
            needs="a width at which the softmax collapses; at 64 it does not",
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
                "model.d_model": 1024,
                "model.num_layers": 24,
                "model.pattern": (*("dense",) * 12, *("moe",) * 12),
                **{f"model.blocks.{b}.mixer.num_heads": 16 for b in ("dense", "moe")},
                "model.blocks.dense.ffn.hidden": 4096,
                f"{MOE}.bank.hidden": 4096,
                "model.dtype": "bfloat16",
                "data.name": "imagenet2012",
                "data.batch_size": 4096,
                "train.steps": 90_000,
                "optimizer.warmup_steps": 10_000,
                "optimizer.learning_rate": 1e-3,
                "optimizer.schedule": "rsqrt",
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                # As many slots in all as there are patches, as at the small scale.
                "soft": soft(196, 1, 4096),
                "uniform": soft(196, 1, 4096, dispatch="uniform", combine="uniform"),
                "soft_16x1": soft(196, 1, 4096),
                "soft_4x4": soft(49, 4, 4096),
                "soft_2x8": soft(28, 7, 4096),
                "soft_dispatch_only": soft(196, 1, 4096, combine="uniform"),
                "soft_combine_only": soft(196, 1, 4096, dispatch="uniform"),
                "no_normalisation": soft(196, 1, 4096, normalise=False),
                **{name: {f"{MOE}.num_experts": 196} for name in ("token_choice", "expert_choice")},
            },
        ),
    },
    metrics=("eval/stats/entropy",),
)
