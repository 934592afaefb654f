"""SMEAR (Muqeeth et al. 2023): experts are averaged, parameter by parameter, for each sequence, and one expert runs.

Byte language models with adapters after every feed-forward layer, three experts for three domains (code, reference, literature). A
decoder may not average over its own future, so each segment of 16 bytes is routed by the one before it; `tag` is told the domain.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower, within

FFN = "model.blocks.moe.ffn"
MIXER = "model.blocks.moe.mixer"


def smear(layer: dict, num_experts: int = 3, hidden: int = 16, **fields) -> dict:
    """Adapters that refine `layer`."""
    bank = {"kind": "bottleneck", "hidden": hidden}
    return {
        "kind": "smear", "layer": layer, "num_experts": num_experts, "bank": bank, "route_by": "previous", "segment": 16,
        "combine": "merge", "expert_dropout": 0.1, "router_scale": 1e-2, **fields,
    }  # fmt: skip


def base():
    """Four layers of width 64 with SMEAR after the feed-forward layers."""
    config = small_lm.get_config()
    config.model.pattern = ("moe",)
    config.model.blocks.moe.ffn = smear({"kind": "glu", "hidden": 128})
    return config


SAME = {"kind": "same", "init": {"kind": "normal", "std": 0.01}}

STUDY = Study(
    slug="smear",
    title="SMEAR: soft merging of experts with adaptive routing",
    arxiv="2306.03745",
    implements=("moejax.SMEAR", "moejax.MergePlan"),
    departures=Departures(
        scale="bytes and domains of one corpus instead of tasks; four layers, three experts instead of eight",
        method="a decoder may not average over its own future, so each segment of 16 bytes is routed by the one before it; "
        "adapters follow feed-forward layers alone, and not attention; a straight-through expert is computed alone, so "
        "its gradient to the router is that of the sampled expert's weight",
        left_out="REINFORCE, DSelect-k, hash and latent-skill routing, the estimators' annealed temperature, and vision",
        capacity="none",
        optimizer="everything is trained together by AdamW with a cosine; the paper trains adapters at a constant rate",
        decay="0.1 in both presets; the paper's is not known to us",
        init="everything from scratch, where the paper adds adapters to a frozen pretrained model",
    ),
    base=base(),
    arms=(
        Arm("wide", {f"{FFN}.num_experts": 1, f"{FFN}.bank.hidden": 48}, note="one adapter with the parameters of all three"),
        Arm("tag", {f"{FFN}.combine": "tag"}, note="the adapter of the row's domain"),
        Arm("st_gumbel", {f"{FFN}.combine": "st_gumbel"}, note="one sampled adapter, straight-through gradient"),
        Arm("ensemble", {f"{FFN}.combine": "ensemble"}, note="all adapters run, outputs are mixed"),
        Arm("smear", note="three adapters, averaged by the previous segment, expert dropout 0.1"),
    ),
    ablations={
        "single": (Arm("single", {f"{FFN}.num_experts": 1}, note="one adapter: equal arithmetic"),),
        "estimators": (
            Arm("top1", {f"{FFN}.combine": "top1"}, note="the most probable adapter, times its probability (Switch)"),
        ),
        "experts": tuple(Arm(f"experts_{e}", {f"{FFN}.num_experts": e}) for e in (6, 12)),
        "expert_dropout": tuple(Arm(f"dropout_{r:g}", {f"{FFN}.expert_dropout": r}) for r in (0.0, 0.3)),
        "router": (Arm("router_scale_1", {f"{FFN}.router_scale": 1.0}, note="routers that start peaked"),),
        "start": (
            Arm("same_start", {f"{FFN}.bank.init_in": SAME, f"{FFN}.bank.init_out": SAME}, note="all adapters start equal"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "smear",
            "st_gumbel",
            headline=True,
            text="merging beats a gradient estimator",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "smear", "tag", text="SMEAR beats being told the domain", matched=("flops", "params")),
        within(
            "eval/bits_per_byte",
            "smear",
            "ensemble",
            0.02,
            text="merging parameters is as good as mixing outputs",
            matched=("params",),
        ),
        lower("eval/bits_per_byte", "smear", "wide", text="SMEAR beats one adapter of equal parameters", matched=("params",)),
        lower("eval/bits_per_byte", "wide", "st_gumbel", text="which beats learned sparse routing", matched=("params",)),
        lower(
            "eval/bits_per_byte", "smear", "top1", text="merging beats the most probable adapter", matched=("flops", "params")
        ),
        lower("eval/bits_per_byte", "experts_6", "smear", text="twice the experts help", matched=()),
        lower("eval/bits_per_byte", "smear", "dropout_0", text="expert dropout helps", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "smear",
            "single",
            text="SMEAR beats one adapter of equal arithmetic",
            matched=("active_params",),
        ),
        lower(
            "eval/bits_per_byte",
            "smear",
            "router_scale_1",
            text="routers have to start near uniform",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "same_start",
            "smear",
            text="adapters that start equal average better",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 768,
                "model.num_layers": 24,
                **{f"{MIXER}.{key}": 12 for key in ("num_heads", "num_kv_heads")},
                f"{FFN}.num_experts": 8,
                f"{FFN}.layer.hidden": 2048,
                f"{FFN}.bank.hidden": 24,
                f"{FFN}.segment": 128,
                "data.seq_len": 1024,
                "data.batch_size": 128,
                "train.steps": 600_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.schedule": "constant",
                "optimizer.warmup_steps": 2_000,
            },
            arms={"wide": {f"{FFN}.bank.hidden": 192}},
        ),
    },
    metrics=("eval/stats/entropy", "eval/stats/max_violation"),
)
