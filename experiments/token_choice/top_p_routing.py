"""Dynamic routing by top-p (Huang et al. 2024): harder tokens take more experts.

Byte language models with a mixture of 8 experts in every layer. A token takes experts until their probabilities sum to p, and
an entropy loss keeps the router from spreading. Compare quality at the mean number of experts that a token really uses.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, below, lower, trend, within

MOE = "model.blocks.moe.ffn"


def base():
    """The small language model, all layers mixtures; p = 0.4, balance 1e-2, entropy 1e-2."""
    config = small_lm.get_config()
    config.model.pattern = ("moe",)
    ffn = config.model.blocks.moe.ffn
    ffn.select = {"kind": "top_p", "p": 0.4, "max_experts": None}
    ffn.losses = {"balance": {"coef": 1e-2, "share": "tokens", "over": "batch"}, "entropy": {"coef": 1e-2}}
    return config


def top_k(k: int) -> dict:
    """The usual rule: raw probabilities of k experts."""
    return {
        f"{MOE}.select": {"kind": "top_k", "k": k},
        f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}, "entropy": None},
    }


STUDY = Study(
    slug="top_p_routing",
    title="Top-p routing: harder tokens need more experts",
    arxiv="2403.07652",
    implements=("moejax.TopP", "moejax.Entropy", "moejax.Balance"),
    departures=Departures(
        scale="bytes and one epoch; 8 experts in all layers, where the paper has 16 in every other one",
        method="the entropy loss is 1e-2 here: 1e-4 acts over 100 billion tokens, and not over 0.3 million bytes",
        left_out="the larger dense model, downstream tasks and how many experts each of them takes",
        capacity="none",
        optimizer="the base's rates here; the paper's 3e-4 in the paper preset",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("top1", top_k(1), note="one expert per token"),
        Arm("top2", top_k(2), note="two experts per token"),
        Arm("top_p", note="p 0.4, entropy loss 1e-2"),
        Arm("no_entropy", {f"{MOE}.losses.entropy": None}, note="top_p without its entropy loss"),
    ),
    ablations={
        "p": tuple(Arm(f"p_{p:g}", {f"{MOE}.select.p": p}) for p in (0.2, 0.3, 0.5, 0.6)),
        "entropy": tuple(Arm(f"entropy_{c:g}", {f"{MOE}.losses.entropy.coef": c}) for c in (1e-4, 1e-3, 1e-1)),
    },
    claims=(
        lower("eval/bits_per_byte", "top_p", "top2", headline=True, text="top-p beats top-2", matched=("params",)),
        below("eval/stats/experts_per_token", "top_p", 1.8, text="with less than 90 % of its active experts"),
        lower(
            "eval/stats/experts_per_token",
            "top_p",
            "no_entropy",
            text="without the entropy loss, tokens take more and more experts",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "top_p", "top1", text="top-p beats top-1", matched=("params",)),
        within("eval/bits_per_byte", "p_0.3", "p_0.5", 0.03, text="a p between 0.3 and 0.5 works", matched=("flops", "params")),
        trend(
            "eval/stats/experts_per_token",
            {0.2: "p_0.2", 0.3: "p_0.3", 0.4: "top_p", 0.5: "p_0.5", 0.6: "p_0.6"},
            low=0,
            text="a larger p costs compute, which the router does not learn to save",
            matched=("flops", "params"),
        ),
        trend(
            "eval/stats/experts_per_token",
            {1e-4: "entropy_0.0001", 1e-3: "entropy_0.001", 1e-2: "top_p", 1e-1: "entropy_0.1"},
            high=0,
            log=True,
            text="the more the entropy loss weighs, the fewer experts a token takes",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 24,
                "model.pattern": ("moe", "dense"),
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 2816,
                f"{MOE}.num_experts": 16,
                f"{MOE}.bank.hidden": 2816,
                f"{MOE}.losses.entropy.coef": 1e-4,
                "data.seq_len": 2048,
                "data.batch_size": 2048,
                "train.steps": 24_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.warmup_steps": 2_000,
            }
        ),
    },
    metrics=("eval/stats/experts_per_token", "eval/stats/entropy"),
)
