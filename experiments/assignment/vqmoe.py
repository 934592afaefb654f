"""VQMoE (Do et al. 2024): a token runs the expert that its router picks and the expert that its code names, among the same experts.

Byte language models with 8 experts in every other feed-forward layer. VQMoE runs two experts per token, so its measure is top-2; the
discrete path alone runs one, and its measure is the top-1 mixture.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, above, higher, lower

MOE = "model.blocks.moe.ffn"


def base():
    """Top-1 of 8 ReLU experts, raw softmax weight, balance 1e-2."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.bank = {"kind": "ffn", "hidden": 64, "activation": "relu"}
    ffn.select = {"kind": "top_k", "k": 1, "score": "softmax"}
    return config


def vq(**fields) -> dict:
    """Both paths; straight-through, 8 codes, loss 0.08."""
    return {f"{MOE}.kind": "vq_moe", **{f"{MOE}.{name}": value for name, value in fields.items()}}


# Normalised after the selection, so that the gate of one expert is the constant 1.
RELEASED_GATE = {
    f"{MOE}.select": {"kind": "top_k", "k": 1, "score": "softmax_selected", "constant_gate": True},
    f"{MOE}.router": {"kind": "cosine", "projection": 8, "scale_init": 10.0},
}

STUDY = Study(
    slug="vqmoe",
    title="VQMoE: discrete representations in sparse mixtures of experts",
    arxiv="2411.19402",
    implements=("moejax.VQMoE",),
    departures=Departures(
        scale="bytes, one epoch and rotary attention; 8 experts in every other layer instead of 16 in all of them",
        method="true straight-through quantisation is the default, and the release's blend an arm",
        left_out="vision, residual and lookup-free codebooks, and robustness: how many tokens change their expert between "
        "checkpoints, or under corrupted input, is what `--analyse` shows",
        capacity="none",
        optimizer="AdamW instead of Adam; the base's rates here",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("smoe", note="top-1 of 8"),
        Arm("top2", {f"{MOE}.select.k": 2, f"{MOE}.select.normalise": True}, note="top-2 of 8: the arithmetic of vqmoe"),
        Arm("vqmoe", vq(), note="top-1 and the code's expert; 8 codes, straight-through, VQ loss 0.08"),
        Arm("discrete", vq(paths="discrete"), note="the code's expert alone: the arithmetic of smoe"),
    ),
    ablations={
        "codes": tuple(Arm(f"codes_{k}", vq(num_codes=k), note=f"{k} codes") for k in (4, 12, 16, 32)),
        "quantise": (
            Arm("blend", vq(quantise="blend"), note="the release's default: nearly the token itself, rho 0.05"),
            Arm("cosine", vq(distance="cosine"), note="codes compared by angle"),
            Arm("averaged", vq(codebook="averaged"), note="codes are running averages of their tokens"),
            Arm("revive", vq(revive_below=0.1), note="codes that fall out of use move to tokens"),
        ),
        "combine": (Arm("mean", vq(combine="mean"), note="half of each path"),),
        "gate": (
            Arm("stable_gate", RELEASED_GATE, note="top-1 with the release's gate: cosine, constant 1"),
            Arm("vqmoe_stable_gate", vq() | RELEASED_GATE, note="vqmoe with that gate"),
        ),
        "experts": (
            Arm("smoe_4", {f"{MOE}.num_experts": 4}, note="top-1 of 4"),
            Arm("vqmoe_4", vq() | {f"{MOE}.num_experts": 4}, note="half the experts"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "vqmoe",
            "top2",
            headline=True,
            text="VQMoE beats the mixture of equal arithmetic",
            matched=("flops",),
        ),
        lower("eval/bits_per_byte", "vqmoe", "smoe", text="VQMoE beats top-1", matched=("params",)),
        lower(
            "eval/bits_per_byte", "discrete", "smoe", text="the discrete path alone beats top-1", matched=("flops", "params")
        ),
        above("eval/stats/code_perplexity", "vqmoe", 4.0, text="more than half of the codes are in use"),
        lower("eval/bits_per_byte", "vqmoe_4", "smoe", text="VQMoE with half the experts beats top-1", matched=()),
        lower("eval/bits_per_byte", "vqmoe", "codes_32", text="as many codes as experts are best", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "vqmoe",
            "mean",
            text="the learned gate between the paths is worth it",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte", "vqmoe_stable_gate", "stable_gate", text="VQMoE beats the stable gate", matched=("params",)
        ),
        higher(
            "eval/stats/code_perplexity",
            "revive",
            "vqmoe",
            text="codes that move to tokens when they fall out of use stay in use",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                "model.d_model": 1024,
                "model.num_layers": 12,
                "model.pattern": ("moe",),
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.num_experts": 16,
                f"{MOE}.bank.hidden": 2048,
                "model.dtype": "bfloat16",
                "model.remat": "full",
                "data.name": "lm1b",
                "data.domains": None,
                "data.seq_len": 512,
                "data.batch_size": 44,
                "train.steps": 100_000,
                "train.log_every": 100,
                "optimizer.learning_rate": 3.5e-4,
                "optimizer.warmup_steps": 4_000,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={"smoe_4": {f"{MOE}.num_experts": 8}, "vqmoe_4": {f"{MOE}.num_experts": 8}},
        ),
    },
    metrics=("eval/stats/code_perplexity", "eval/stats/max_violation"),
    notes="On bytes the learned codebook collapses: two or three codes of eight are in use, and where codes alone route (`discrete`), "
    "one expert takes more than half of the tokens. Running averages, or codes that move to tokens when they fall out of use (`quantise`), keep about twice as many, not all. The "
    "release's blend has as few, but as it hands on nearly the token itself, its losses are the best of the group.",
)
