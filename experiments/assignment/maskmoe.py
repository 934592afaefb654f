"""MaskMoE (Su et al. 2024): a learned router among the experts that a token's id may use: one for rare ids, several for frequent ones.

Byte language models with 16 experts in every other feed-forward layer, one a token. The frequent bytes are those that cover 80 % of
the training data. With one expert for all ids this is a hash layer, with all experts for all ids it is Switch, both here as controls
of the same size and compute. `reversed` gives the rare bytes the choice instead of the frequent ones.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.quantities import mean
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower

MOE = "model.blocks.moe.ffn"
MASK = {
    "kind": "token_mask",
    "router": {"kind": "linear"},
    "frequencies": {"from_data": "token_frequencies", "batches": 64},
    "head": 0.8,
    "head_experts": 8,
    "tail_experts": 1,
}


def base():
    """16 experts, top-1, balance 1e-2; 8 experts for a frequent byte."""
    config = small_lm.get_config()
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.router = MASK
    ffn.select = {"kind": "top_k", "k": 1}
    ffn.bank.hidden = 128
    ffn.losses = {"balance": {"coef": 1e-2, "over": "batch"}}
    return config


def masked(**fields) -> dict:
    return {f"{MOE}.router.{name}": value for name, value in fields.items()}


SWITCH = {f"{MOE}.router": {"kind": "linear"}}
HASH = {f"{MOE}.router": {"kind": "hash", "hash": "random"}, f"{MOE}.losses": {}}
SHARED = {f"{MOE}.shared": {"kind": "glu", "hidden": 64}, f"{MOE}.bank.hidden": 64}

STUDY = Study(
    slug="maskmoe",
    title="MaskMoE: which experts a token may use",
    arxiv="2407.09816",
    implements=("moejax.TokenMask", "moejax.data.token_frequencies"),
    departures=Departures(
        scale="bytes, whose tail is short, instead of words; 16 experts instead of 64; sizes of the paper preset are ours",
        method="frequent ids are 80 % of all and see 8 experts: the paper's thresholds are not known to us; the balance loss is "
        "Switch's over the masked probabilities, to which ids with one expert are constants",
        left_out="the losses on rare and on frequent tokens, and how much routing changes late in training, which "
        "`experiments.analyse` shows",
        capacity="none",
        optimizer="the rates of both presets are ours",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense",)}, note="no experts; equal compute"),
        Arm("switch", SWITCH, note="all 16 experts for all bytes"),
        Arm("hash", HASH, note="one expert, by a random hash of the byte"),
        Arm("maskmoe", note="8 of 16 experts for the bytes that are 80 % of all, one for the others"),
        Arm("reversed", masked(head_experts=1, tail_experts=8), note="one expert for frequent bytes, 8 for the others"),
    ),
    ablations={
        "experts": (
            *(Arm(f"head_{v}", masked(head_experts=v), note=f"{v} experts for a frequent byte") for v in (1, 2, 4, 16)),
            Arm("tail_2", masked(tail_experts=2), note="two experts for a rare byte"),
            Arm("all_8", masked(tail_experts=8), note="8 experts for every byte"),
        ),
        "threshold": tuple(
            Arm(f"threshold_{h:g}", masked(head=h), note=f"frequent bytes are {h:.0%} of all") for h in (0.4, 0.6, 0.95)
        ),
        "shared": (
            Arm("maskmoe_shared", SHARED, note="half of the width in a shared expert"),
            Arm("switch_shared", {**SWITCH, **SHARED}, note="half of the width in a shared expert"),
            Arm("hash_shared", {**HASH, **SHARED}, note="half of the width in a shared expert"),
        ),
        "draw": tuple(Arm(f"draw_{seed}", masked(seed=seed), note="other masks") for seed in (1, 2)),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "maskmoe",
            "switch",
            headline=True,
            text="MaskMoE beats a router that sees all experts",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "maskmoe", "hash", text="and a hash layer", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "maskmoe",
            "reversed",
            text="rare tokens want one expert, and frequent ones the choice",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "maskmoe",
            "head_1",
            text="frequent tokens want more than one expert",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "maskmoe", "all_8", text="rare tokens want no more than one", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "maskmoe",
            "head_16",
            text="a middling number of experts is best for the frequent ones",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "maskmoe",
            "threshold_0.4",
            text="80 % is a better threshold than 40 %",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "maskmoe", "threshold_0.95", text="and than 95 %", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "maskmoe_shared",
            "switch_shared",
            text="it holds beside a shared expert",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "maskmoe_shared",
            "hash_shared",
            text="and against a hash layer with one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            mean("maskmoe", "draw_1", "draw_2"),
            "switch",
            text="whatever masks are drawn",
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
                **{f"model.blocks.{b}.mixer.{key}": 12 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                **dict.fromkeys(("model.blocks.dense.ffn.hidden", f"{MOE}.bank.hidden"), 2048),
                "model.vocab_size": 32_000,
                f"{MOE}.num_experts": 64,
                "data.seq_len": 1024,
                "data.batch_size": 512,
                "train.steps": 100_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.warmup_steps": 2_000,
            },
            arms={
                "head_16": {f"{MOE}.router.head_experts": 64},
                **{
                    f"{arm}_shared": {f"{MOE}.shared.hidden": 1024, f"{MOE}.bank.hidden": 1024}
                    for arm in ("maskmoe", "switch", "hash")
                },
            },
        ),
    },
    metrics=("eval/stats/max_violation", "eval/stats/entropy"),
    notes="The paper preset needs `data.tokenizer` with 32,000 ids.",
)
