"""SMoE-Dropout (Chen et al. 2023): a random, frozen router and ever more experts regularise a dense model and make it slimmable.

Byte language models in which every feed-forward layer is cut into 8 experts. In training k goes from 2 to all 8, under a router that
keeps its random start; weights are the softmax over the selected. At full capacity the control is the dense layer of the same
parameters, plain and with dropout. The arms `..._kN` train nothing: they evaluate a finished run with N experts.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, higher, lower

MOE = "model.blocks.moe.ffn"
STEPS = 3000
FROZEN = {"trainable": {"rest": {"what": ("*",), "but": ("routers",)}}}
INFERENCE = (1, 2, 4, 8)


def base():
    """All layers mixtures of 8 experts of width 64; k from 2 to 8, no balance loss, no noise, no capacity."""
    config = small_lm.get_config()
    config.model.pattern = ("moe",)
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 512, "activation": "relu"}
    ffn = config.model.blocks.moe.ffn
    ffn.router = {"kind": "linear", "init_w": {"kind": "fan_in", "scale": 1 / 3, "distribution": "uniform"}}
    ffn.select = {"kind": "scheduled_k", "k": 8, "first": 2, "steps": STEPS, "score": "softmax_selected"}
    ffn.bank = {"kind": "ffn", "hidden": 64, "activation": "relu"}
    ffn.losses = {}
    config.train.steps = STEPS
    return config


def constant(k: int) -> dict:
    return {f"{MOE}.select": {"kind": "top_k", "k": k, "score": "softmax_selected", "constant_gate": k == 1}}


def slim(arm: str, k: int) -> dict:
    """A finished run with k experts."""
    start = {"init.source": {"kind": "run", "arm": arm}, "train.steps": 0, "optimizer.warmup_steps": 0}
    return {**start, **constant(k)}


def slimmed(arm: str) -> tuple[Arm, ...]:
    return tuple(Arm(f"{arm}_k{k}", slim(arm, k), note=f"{arm} as it ends, {k} of 8 experts") for k in INFERENCE)


LEARNED = {**constant(4), f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}}, f"{MOE}.router": {"kind": "linear"}}

STUDY = Study(
    slug="smoe_dropout",
    title="Sparse MoE as the new dropout",
    arxiv="2303.01610",
    implements=("moejax.ScheduledK", "moejax.Linear"),
    full_size=1e7,
    departures=Departures(
        scale="bytes of prose, code and reference instead of enwik8, of which none is seen twice; rotary attention over 64 "
        "bytes instead of Transformer-XL with a memory",
        method="8 experts instead of 16, so k goes from 2 to 8; the router has no bias, which moves its hyperplanes by at most "
        "one part in sqrt(d) of a token's length",
        left_out="THOR and concrete dropout, BERT and RoBERTa, fine-tuning downstream, and models of which only the first layers "
        "are mixtures",
        capacity="none",
        optimizer="AdamW with a warm-up here; Adam's rate without one in the paper preset",
        decay="0.1 here, none in the paper preset and in the paper",
        init="none",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense",)}, note="the same parameters as one wide layer"),
        Arm("dropout", {"model.pattern": ("dense",), "model.blocks.dense.dropout": 0.1}, note="dense with dropout 0.1"),
        Arm("learned", LEARNED, note="learnt router, top-4 of 8, balance loss"),
        Arm("constant", {**FROZEN, **constant(4)}, note="random frozen router, top-4 throughout"),
        Arm("smoe_dropout", FROZEN, note="random frozen router, k from 2 to 8; evaluated with all 8"),
    ),
    ablations={
        "slim": (*slimmed("smoe_dropout"), *slimmed("learned"), *slimmed("constant")),
        "router": (
            Arm("learned_router", note="k from 2 to 8 with a router that learns"),
            Arm(
                "redrawn",
                {f"{MOE}.router": {"kind": "random"}},
                note="k from 2 to 8 of experts drawn anew for every token and step",
            ),
        ),
        "schedule": (
            Arm("full", {**FROZEN, **constant(8)}, note="all experts throughout: the ensemble without its dropout"),
            Arm("decrease", {**FROZEN, f"{MOE}.select.first": 8, f"{MOE}.select.last": 2}, note="k from 8 to 2"),
            *(Arm(shape, {**FROZEN, f"{MOE}.select.shape": shape}) for shape in ("cosine", "exponential", "doubling")),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "smoe_dropout",
            "dense",
            headline=True,
            text="at full capacity it beats dense training",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte", "smoe_dropout", "dropout", text="and dense training with dropout", matched=("flops", "params")
        ),
        lower(
            "eval/bits_per_byte",
            "smoe_dropout",
            "constant",
            text="growing k beats a constant one of the same compute and more",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "smoe_dropout_k8",
            "smoe_dropout_k4",
            text="8 experts beat 4 at inference",
            matched=("params",),
        ),
        lower("eval/bits_per_byte", "smoe_dropout_k4", "smoe_dropout_k2", text="4 beat 2", matched=("params",)),
        lower(
            "eval/bits_per_byte",
            "smoe_dropout_k2",
            "smoe_dropout_k1",
            text="2 beat 1: more experts are always better",
            matched=("params",),
        ),
        higher(
            "eval/bits_per_byte",
            "learned_k8",
            "learned_k4",
            text="a learnt router is best at the k that it was trained with",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "smoe_dropout",
            "learned_router",
            text="for this purpose a random router beats a learnt one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "smoe_dropout",
            "redrawn",
            text="a frozen random router beats random experts",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte", "smoe_dropout", "decrease", text="k has to grow, not to shrink", matched=("flops", "params")
        ),
    ),
    presets={
        "smoke": Preset({**SMOKE.overrides, f"{MOE}.select.steps": SMOKE.overrides["train.steps"]}),
        "cpu": Preset(),
        # Transformer-XL on enwik8: four layers of 16 experts of width 512, k from 8 to 16; 19 million parameters.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 256,
                **{f"model.blocks.{b}.mixer.{key}": 8 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                **{f"model.blocks.{b}.mixer.head_dim": 64 for b in ("dense", "moe")},
                "model.blocks.dense.ffn.hidden": 8192,
                f"{MOE}.num_experts": 16,
                f"{MOE}.bank.hidden": 512,
                f"{MOE}.select": {"kind": "scheduled_k", "k": 16, "first": 8, "steps": 400_000, "score": "softmax_selected"},
                "data.seq_len": 512,
                "data.batch_size": 22,
                "train.steps": 400_000,
                "optimizer.learning_rate": 2.5e-4,
                "optimizer.warmup_steps": 0,
                "optimizer.weight_decay": 0.0,
            },
            arms={
                **{arm: {f"{MOE}.select.k": 8} for arm in ("learned", "constant")},
                "full": {f"{MOE}.select.k": 16},
                "decrease": {f"{MOE}.select.first": 16, f"{MOE}.select.last": 8},
                **{
                    f"{arm}_k{k}": {f"{MOE}.select.k": 2 * k, f"{MOE}.select.constant_gate": False}
                    for arm in ("smoe_dropout", "learned", "constant")
                    for k in INFERENCE
                },
            },
        ),
    },
    metrics=("eval/stats/experts_per_token", "eval/stats/max_violation"),
    notes="The schedule's `steps` are those of training; an override of train.steps on the command line wants the same for "
    f"{MOE}.select.steps. The gain is one of regularisation, and the paper's models see their data many times; here no byte is seen "
    "twice before the end of the first epoch.",
)
