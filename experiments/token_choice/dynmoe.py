"""DynMoE (Guo et al. 2024): tokens take every expert that passes a learned threshold, and the pool of experts sizes itself.

Byte language models with a mixture in every other feed-forward layer. The paper's claim is about tuning: without a search over the
number of experts K and of choices k, DynMoE does as well as the settings of a grid do on average. The grid here is top-1, top-2
and top-4 of 16 experts, as many as the pool has slots (`grid` adds 4 and 8); what a setting computes differs, and is no part of the claim.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.quantities import lowest, mean
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, below, lower, within

MOE = "model.blocks.moe.ffn"


def base():
    """small_lm with top-any gating over 16 slots, of which 8 hold experts at the start."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.router = {
        "kind": "expert_pool",
        "initial": 8,
        "scale_init": 10.0,
        "learn_scale": True,
        "diversity": 1e-2,
        "cycle": 60,
    }
    ffn.select = {"kind": "top_any"}
    ffn.losses = {}
    return config


def top_k(k: int, experts: int = 16) -> dict:
    """A setting of the grid: softmax top-k with a balance loss."""
    return {
        f"{MOE}.num_experts": experts,
        f"{MOE}.router": {"kind": "linear"},
        f"{MOE}.select": {"kind": "top_k", "k": k, "normalise": k > 1},
        f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}},
    }


GRID = {f"top{k}_of_{e}": (k, e) for e in (4, 8) for k in (1, 2, 4) if k < e}

STUDY = Study(
    slug="dynmoe",
    title="DynMoE: top-any gating and an adaptive pool of experts",
    arxiv="2405.14297",
    implements=("moejax.ExpertPool", "moejax.TopAny", "moejax.AdaptPool", "moejax.TopAnyLoss", "moejax.core.control.control"),
    departures=Departures(
        scale="a small model trained from scratch on bytes; the paper fine-tunes BERT, ViT and vision-language models",
        method="a cycle of the pool is 60 steps instead of 900 (recorded from 20 to 40, updated at 40); 16 slots, half of them "
        "in use at the start, instead of 4",
        left_out="GLUE, DomainBed and vision-language tasks",
        capacity="none",
        optimizer="rates of training from scratch here, of fine-tuning in the paper preset",
        decay="0.1 in both presets; the paper's is not known to us",
        init="from scratch, where the paper's language models are upcycled",
    ),
    base=base(),
    arms=(
        Arm("top1", top_k(1), note="16 experts, one per token"),
        Arm("top2", top_k(2), note="16 experts, two per token"),
        Arm("top4", top_k(4), note="16 experts, four per token"),
        Arm("dynmoe", note="16 slots, 8 experts at the start, auxiliary loss 1e-2"),
    ),
    ablations={
        "grid": tuple(Arm(name, top_k(k, e), note=f"{e} experts, {k} per token") for name, (k, e) in GRID.items()),
        "start": (
            Arm("from_4", {f"{MOE}.router.initial": 4}, note="4 experts at the start"),
            Arm("from_16", {f"{MOE}.router.initial": 16}, note="all 16 at the start"),
        ),
        "aux": (
            Arm("no_aux", {f"{MOE}.router.diversity": 0.0}, note="no auxiliary loss"),
            Arm("aux_1", {f"{MOE}.router.diversity": 1.0}, note="auxiliary loss 1, as for images"),
        ),
        "pool": (
            Arm("fixed_8", {f"{MOE}.router.cycle": 0, f"{MOE}.router.initial": 8}, note="8 experts for ever"),
            Arm("fixed_16", {f"{MOE}.router.cycle": 0, f"{MOE}.router.initial": 16}, note="16 experts for ever"),
        ),
        "gate": (
            Arm(
                "scale_1", {f"{MOE}.router.scale_init": 1.0, f"{MOE}.router.learn_scale": False}, note="no temperature (c = 1)"
            ),
            Arm(
                "vision_language_losses",
                {f"{MOE}.losses": {"top_any": {"coef": 1e-2}}},
                note="with the released balance and efficiency losses",
            ),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "dynmoe",
            mean("top1", "top2", "top4"),
            headline=True,
            text="without a search, better than the average over a grid",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "dynmoe",
            lowest("top1", "top2", "top4"),
            by=-0.05,
            text="and near its best setting",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "dynmoe",
            mean(*(f"top{k}" for k in (1, 2, 4)), *GRID),
            text="the same of a grid over numbers of experts too",
            matched=("steps",),
        ),
        below("eval/stats/experts_per_token", "dynmoe", 4.0, text="with fewer active experts than top-4"),
        lower(
            "eval/stats/experts_per_token",
            "dynmoe",
            "no_aux",
            text="without the auxiliary loss tokens take more experts",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "from_4",
            "from_16",
            0.05,
            text="the size of the first pool matters little",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "dynmoe",
            "fixed_8",
            text="a pool that adapts is better than the one it started with",
            matched=("flops", "params"),
        ),
        lower(
            "eval/stats/experts_per_token",
            "vision_language_losses",
            "dynmoe",
            text="the released efficiency loss lowers the number of active experts",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 2560,
                "model.num_layers": 32,
                "model.pattern": ("dense", "moe"),
                "model.vocab_size": 50_304,
                **{f"model.blocks.{b}.mixer.{key}": 32 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 6912,
                f"{MOE}.num_experts": 4,
                f"{MOE}.router.initial": 4,
                f"{MOE}.router.cycle": 900,
                f"{MOE}.bank.hidden": 6912,
                "data.seq_len": 2048,
                "data.batch_size": 128,
                "train.steps": 10_000,
                "optimizer.learning_rate": 2e-5,
                "optimizer.warmup_steps": 300,
                "eval.every": 1_000,
            },
            arms={
                **{name: {f"{MOE}.num_experts": 4} for name in ("top1", "top2", "top4")},
                **{name: {f"{MOE}.router.initial": 4} for name in ("fixed_8", "fixed_16", "from_16")},
            },
        ),
    },
    metrics=("eval/stats/experts_per_token", "eval/stats/pool_size", "eval/stats/unrouted"),
    notes="Inference takes the arg-max expert where no threshold is passed, training takes none.",
)
