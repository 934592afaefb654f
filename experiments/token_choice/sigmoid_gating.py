"""Shared experts and normalised sigmoid gates (Nguyen et al. 2025): what DeepSeek's two departures from a plain mixture are worth.

Byte language models, 16 experts of width 32 in every other feed-forward layer, four active. `smoe` gates with the softmax over all
experts; `v2` makes one of the four a shared one, as DeepSeek-V2; `v3` also normalises sigmoid gates over the selection, as
DeepSeek-V3; `smoe_sg` has those gates alone.

The paper's theory says that both need fewer samples, so the claims are about steps to a loss as well as about the loss.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, faster, lower

MOE = "model.blocks.moe.ffn"
SIGMOID = {f"{MOE}.select.score": "sigmoid", f"{MOE}.select.normalise": True}


def base():
    """The plain mixture: 16 experts, top-4, softmax gates."""
    config = small_lm.get_config()
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 128}
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.select = {"kind": "top_k", "k": 4, "score": "softmax", "normalise": False}
    ffn.bank = {"kind": "ffn", "hidden": 32}
    config.eval = {"every": 50, "batches": 16, "split": "validation"}
    return config


def shared(count: int, experts: int = 16, k: int = 4, hidden: int = 32) -> dict:
    """`count` of the `experts`, and of the k active ones, are shared."""
    return {
        f"{MOE}.num_experts": experts - count,
        f"{MOE}.select.k": k - count,
        f"{MOE}.shared": {"kind": "ffn", "hidden": hidden * count},
    }


LARGE_SHARED = ("v2", "v3", "v2_normalised", "v3_raw")

STUDY = Study(
    slug="sigmoid_gating",
    title="Shared experts and normalised sigmoid gating",
    arxiv="2505.10860",
    implements=("moejax.MoE", "moejax.TopK", "moejax.routing.routing_overlap"),
    departures=Departures(
        scale="bytes and one epoch; 16 experts instead of 66; width, depth and batch of the paper preset are ours, chosen to "
        "give its numbers of parameters and tokens",
        method="four active experts of which one is shared, where the paper has eight and two",
        left_out="the rates of convergence themselves (Gaussian mixtures of regressions), vision-language models, saturation and "
        "change rate (they are `moejax.routing.routing_overlap` of the plans of two checkpoints), and DeepSeek-V3's bias "
        "and scale",
        capacity="none",
        optimizer="rates of both presets are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("smoe", note="16 experts, top-4, softmax"),
        Arm("v2", shared(1), note="15 experts, top-3, softmax, and one shared"),
        Arm("v3", shared(1) | SIGMOID, note="15 experts, top-3, normalised sigmoid, and one shared"),
        Arm("smoe_sg", SIGMOID, note="16 experts, top-4, normalised sigmoid"),
    ),
    ablations={
        # Two things change at once from softmax to normalised sigmoid gates.
        "gate": (
            Arm("smoe_normalised", {f"{MOE}.select.normalise": True}, note="smoe with gates normalised over the selection"),
            Arm("v2_normalised", shared(1) | {f"{MOE}.select.normalise": True}, note="v2 with normalised gates"),
            Arm("v3_raw", shared(1) | SIGMOID | {f"{MOE}.select.normalise": False}, note="v3 with gates as they are"),
        ),
        "shared": (
            Arm("v3_shared_2", shared(2) | SIGMOID, note="2 shared, 2 routed"),
            Arm("v2_shared_2", shared(2), note="2 shared, 2 routed"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "v3",
            "smoe",
            headline=True,
            text="shared expert and sigmoid gates together beat the plain mixture",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "v2", "smoe", text="a shared expert helps by itself", matched=("flops", "params")),
        lower("eval/bits_per_byte", "smoe_sg", "smoe", text="sigmoid gates help by themselves", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "v3",
            "v2",
            text="sigmoid gates beat softmax beside a shared expert",
            matched=("flops", "params"),
        ),
        faster(
            "eval/bits_per_byte",
            "v3",
            "smoe",
            by=1.25,
            text="V3 reaches the plain mixture's loss in at most 80 % of the steps",
            matched=("flops", "params"),
        ),
        faster(
            "eval/bits_per_byte",
            "v2",
            "smoe",
            by=1.25,
            text="V2 reaches the plain mixture's loss in at most 80 % of the steps",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "v3",
            "v2_normalised",
            text="the sigmoid matters, and not the normalisation alone",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "v3_shared_2",
            "v2_shared_2",
            text="beside two shared experts, as published, sigmoid gates beat softmax too (13.42 against 13.49)",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # 158M parameters, 6.5B tokens, 66 experts.
        "paper": Preset(
            {
                "model.d_model": 512,
                "model.num_layers": 16,
                "model.pattern": ("moe",),
                **{f"model.blocks.{b}.mixer.{key}": 8 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.num_experts": 66,
                f"{MOE}.select.k": 8,
                f"{MOE}.bank.hidden": 128,
                "model.dtype": "bfloat16",
                "model.vocab_size": 8192,
                "data.name": "c4",
                "data.domains": None,
                "data.seq_len": 1024,
                "data.batch_size": 64,
                "train.steps": 100_000,
                "train.log_every": 100,
                "optimizer.learning_rate": 2.5e-4,
                "optimizer.warmup_steps": 2_000,
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                **{name: shared(2, 66, 8, 128) for name in LARGE_SHARED},
                **{name: shared(4, 66, 8, 128) for name in ("v2_shared_2", "v3_shared_2")},
            },
        ),
    },
    metrics=("eval/stats/load_entropy", "eval/stats/max_violation", "eval/stats/entropy"),
    notes="The paper's perplexities differ by 0.2 to 1.5 %: a few seeds of a small model will hardly tell them apart.",
)
