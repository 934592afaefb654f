"""ReMoE (Wang et al. 2024): ReLU gates instead of top-k, and an L1 loss whose weight drives the mean number of experts to k.

Byte language models with 8 experts in every other feed-forward layer. The number of active experts is about 4 at the start and
is brought to k = 2 over all layers, so arms are compared at equal parameters that a token uses at k; the FLOPs of a step are those of
all experts, as none may be left out while many are active.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower, within

MOE = "model.blocks.moe.ffn"


def base():
    """small_lm with ReLU routing to 2 experts per token."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.select = {"kind": "relu", "k": 2.0, "max_experts": None}
    ffn.losses = {"adaptive_l1": {"k": 2.0, "coef": 1e-4, "rate": 1.2, "balanced": True}}
    return config


def top_k(k: int) -> dict:
    """The usual rule: softmax, top-k, a balance loss of 1e-2."""
    return {
        f"{MOE}.select": {"kind": "top_k", "k": k},
        f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}},
    }


def target(k: float) -> dict:
    return {f"{MOE}.select.k": k, f"{MOE}.losses.adaptive_l1.k": k}


def loss(**fields: float) -> dict:
    return {f"{MOE}.losses.adaptive_l1.{name}": value for name, value in fields.items()}


STUDY = Study(
    slug="remoe",
    title="ReMoE: fully differentiable mixtures with ReLU routing",
    arxiv="2412.14711",
    implements=("moejax.ReLU", "moejax.AdaptiveL1", "moejax.core.control.control", "moejax.MoE"),
    departures=Departures(
        scale="bytes and one epoch instead of 30 billion tokens; every other layer a mixture",
        method="k = 2 instead of 1 but in 'active', and lambda starts at 1e-4: from 1e-8 it takes a third of the run to act; the "
        "loss is summed over layers, as in the released code, which only rescales lambda",
        left_out="hash layers, Lory, SparseMixer and expert choice as baselines; zero-shot tasks; speed",
        capacity="none",
        optimizer="the base's rates here; the paper's 5e-4 falls to a tenth by a cosine, as here",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's instead of a standard deviation of 0.01",
    ),
    base=base(),
    arms=(
        Arm("top2", top_k(2), note="softmax top-2 with a balance loss: the active compute that `remoe` aims at"),
        Arm("remoe", note="ReLU gates, adaptive L1 with load balancing, k 2"),
        Arm("relu_l1", loss(balanced=False), note="the same without load balancing"),
    ),
    ablations={
        "active": (
            Arm("top1", top_k(1), note="softmax top-1"),
            Arm("remoe_k1", target(1.0), note="ReLU gates, k 1"),
        ),
        "rate": tuple(Arm(f"rate_{rate:g}", loss(rate=rate)) for rate in (1.02, 1.05, 1.5)),
        "start": tuple(Arm(f"start_{start:g}", loss(coef=start)) for start in (1e-8, 1e-6, 1e-2)),
        "experts": (
            Arm("top2_32", {**top_k(2), f"{MOE}.num_experts": 32}, note="32 experts, top-2"),
            Arm("remoe_32", {f"{MOE}.num_experts": 32}, note="32 experts, ReLU"),
        ),
        "granularity": (
            Arm(
                "top8_fine",
                {**top_k(8), f"{MOE}.num_experts": 32, f"{MOE}.bank.hidden": 16},
                note="experts of a quarter's width, top-8",
            ),
            Arm("remoe_fine", {**target(8.0), f"{MOE}.num_experts": 32, f"{MOE}.bank.hidden": 16}, note="the same, ReLU"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "remoe",
            "top2",
            headline=True,
            text="ReLU routing beats top-k at equal active compute",
            matched=("active_params", "params"),
        ),
        within(
            "eval/stats/experts_per_token",
            "remoe",
            "top2",
            0.3,
            text="the adaptive loss holds the mean number of experts at k",
            matched=(),
        ),
        lower(
            "eval/stats/max_violation",
            "remoe",
            "relu_l1",
            text="load balancing inside the L1 loss balances",
            matched=("flops", "params"),
        ),
        within("eval/bits_per_byte", "remoe", "relu_l1", 0.05, text="and costs nothing", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "remoe_32",
            "top2_32",
            text="the gain is there with four times the experts",
            matched=("active_params", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "remoe_fine",
            "top8_fine",
            text="and with experts of a quarter's width",
            matched=("active_params", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "remoe",
            "start_1e-06",
            0.03,
            text="lambda's start does not matter over orders of magnitude",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "remoe_k1",
            "top1",
            text="and at one expert a token, the paper's own number",
            matched=("active_params", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "rate_1.05",
            "rate_1.5",
            0.03,
            text="nor does its rate, from 1.05 to 1.5",
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
                "model.num_layers": 12,
                "model.pattern": ("moe",),
                "model.vocab_size": 50_257,
                **{f"model.blocks.{b}.mixer.{key}": 12 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.bank.hidden": 2048,
                "data.seq_len": 1024,
                "data.batch_size": 512,
                "train.steps": 60_000,
                "optimizer.learning_rate": 5e-4,
                "optimizer.warmup_steps": 600,
            },
            arms={
                **{name: {f"{MOE}.select.k": 1} for name in ("top2", "top1", "top2_32")},
                **{name: {**target(1.0), **loss(coef=1e-8)} for name in ("remoe", "relu_l1", "remoe_k1", "remoe_32")},
                **{name: {**target(1.0), **loss(coef=1e-8)} for name in ("rate_1.02", "rate_1.05", "rate_1.5")},
                **{f"start_{start:g}": target(1.0) for start in (1e-8, 1e-6, 1e-2)},
                "top8_fine": {f"{MOE}.select.k": 4, f"{MOE}.bank.hidden": 512},
                "remoe_fine": {**target(4.0), **loss(coef=1e-8), f"{MOE}.bank.hidden": 512},
            },
        ),
    },
    metrics=("eval/stats/experts_per_token", "eval/stats/unrouted"),
)
