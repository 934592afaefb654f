"""Chain of experts (Wang et al. 2025): two passes through one bank with two experts each, against one pass with four.

Byte language models of three layers, each a mixture of 16 small experts. All arms of one block of the table run the same number of
expert matrices for a token; `moe_k8` runs twice as many, and `moe_deep` in `depth` has as many layers as the chain has passes.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, lower, within

MOE = "model.blocks.moe.ffn"


def base():
    """Three layers of 16 experts; raw softmax weights, a balance loss per sequence."""
    config = small_lm.get_config()
    config.model.pattern, config.model.num_layers = ("moe",), 3
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts, ffn.bank.hidden = 16, 32
    ffn.select = {"kind": "top_k", "k": 4}
    ffn.losses = {"balance": {"coef": 1e-2, "over": "group"}}
    return config


def chain(k: int, iterations: int = 2, **fields) -> dict:
    """Every mixture becomes a chain: `k` experts in each iteration."""
    values = {"kind": "chain_of_experts", "iterations": iterations, "select.k": k, **fields}
    return {f"{MOE}.{name}": value for name, value in values.items()}


def shared(hidden: int, num_experts: int) -> dict:
    """Shared experts of this width."""
    return {f"{MOE}.shared": {"kind": "glu", "hidden": hidden, "num_experts": num_experts}}


STUDY = Study(
    slug="chain_of_experts",
    title="Chain-of-experts: communication between experts",
    arxiv="2506.18945",
    implements=("moejax.ChainOfExperts",),
    departures=Departures(
        scale="bytes of text instead of problems of mathematics and SlimPajama; one epoch, three layers, 16 experts instead of "
        "63",
        method="4 experts a token instead of 8, and no shared expert but in 'shared_expert' (the chain runs it twice, so the "
        "mixture there has two)",
        left_out="downstream tasks, and latency: iterations run one after the other; four iterations, and a norm between them",
        capacity="none",
        optimizer="a cosine from the base's rate here; the paper preset has the paper's linear schedule and rates",
        decay="0.1 here, the paper's 0.01 in the paper preset",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("moe", note="4 of 16 experts"),
        Arm("coe", chain(2), note="2 iterations of 2 of 16 experts"),
        Arm("shared_gating", chain(2, gating="shared"), note="coe, with the first iteration's gates in both"),
        Arm("outer_residual", chain(2, residual="outer"), note="coe, with one residual around all iterations"),
        Arm("moe_k8", {f"{MOE}.select.k": 8}, note="8 of 16 experts: twice the compute"),
    ),
    ablations={
        "depth": (Arm("moe_deep", {"model.num_layers": 6}, note="6 layers: more attention and twice the parameters"),),
        "iterations": (Arm("coe_1x4", chain(4, 1), note="one iteration: moe with the inner residual"),),
        "compute": (Arm("coe_2x4", chain(4), note="compute of moe_k8"),),
        "memory": (Arm("coe_12", {**chain(2), f"{MOE}.num_experts": 12}, note="12 experts, three quarters of the parameters"),),
        "sparsity": (
            Arm("moe_all", {f"{MOE}.num_experts": 4}, note="all of 4 experts"),
            Arm("coe_all", {**chain(4), f"{MOE}.num_experts": 4}, note="all of 4 experts, twice"),
        ),
        "residual": (Arm("no_residual", chain(2, residual="none")),),
        "shared_expert": (
            Arm("moe_shared", shared(32, 2), note="two shared experts"),
            Arm("coe_shared", {**chain(2), **shared(32, 1)}, note="one shared expert, which runs twice"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "coe",
            "moe",
            headline=True,
            text="at equal compute, the chain beats the mixture",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "moe",
            "shared_gating",
            text="with shared gates the chain is worse than the mixture",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "coe",
            "outer_residual",
            text="the inner residual beats the outer one",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "coe",
            "moe_k8",
            0.03,
            text="the chain matches a mixture of twice its compute",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "coe_all",
            "moe_all",
            0.03,
            text="where all experts are active the chain gains little",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte", "coe_12", "moe", text="the chain needs fewer experts for the same loss", matched=("flops",)
        ),
        within(
            "eval/bits_per_byte",
            "coe",
            "moe_deep",
            0.03,
            text="two iterations match a mixture of more layers (three times as many in the paper), with 42 % less memory",
            matched=(),
        ),
        lower(
            "eval/bits_per_byte",
            "coe",
            "coe_1x4",
            text="it is the second iteration and not the residual within",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "coe_2x4", "moe_k8", text="at twice the compute too", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "coe",
            "no_residual",
            text="without the inner residual it is worse",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "coe_shared",
            "moe_shared",
            text="it holds beside shared experts, as published",
            matched=("flops",),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                "model.d_model": 1024,
                "model.num_layers": 4,
                "model.blocks.moe.mixer.num_heads": 8,
                "model.blocks.moe.mixer.num_kv_heads": 8,
                f"{MOE}.num_experts": 63,
                f"{MOE}.select.k": 8,
                f"{MOE}.bank.hidden": 704,
                **shared(704, 1),
                "model.dtype": "bfloat16",
                "data.name": "c4",
                "data.domains": None,
                "data.seq_len": 512,
                "data.batch_size": 64,
                "train.steps": 1_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.warmup_steps": 100,
                "optimizer.schedule": "linear",
                "optimizer.weight_decay": 0.01,
            },
            arms={
                **{name: {f"{MOE}.select.k": 4} for name in ("coe", "shared_gating", "outer_residual", "no_residual")},
                # The chain runs its shared expert twice.
                "moe": shared(704, 2),
                "coe_1x4": {f"{MOE}.select.k": 8, **shared(704, 2)},
                "moe_k8": {f"{MOE}.select.k": 24, **shared(704, 2)},
                "moe_deep": {"model.num_layers": 12},
                "coe_2x4": {f"{MOE}.select.k": 12},
                "coe_12": {f"{MOE}.num_experts": 47, f"{MOE}.select.k": 4},
                "moe_all": {f"{MOE}.num_experts": 8},
                "coe_all": {f"{MOE}.num_experts": 8, f"{MOE}.select.k": 8},
                "moe_shared": shared(704, 2),
                "coe_shared": {**shared(704, 1), f"{MOE}.select.k": 4},
            },
        ),
    },
    metrics=("eval/stats/max_violation", "eval/stats/entropy"),
)
