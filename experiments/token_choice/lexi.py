"""LExI (Chitty-Venkata et al. 2025): after training, each layer gets its own number of experts per token, under one budget for all.

Byte language models with 16 experts in every one of 6 layers, trained once with k=4 (24 active experts in all); the other arms train
nothing, and evaluate that model with 12 active experts (ablation `budget`: 18 and 9). What fewer experts cost in a layer is measured on
Gaussian inputs to its mixture (`lexi`, the paper: no data is needed), on the hidden states of 4 batches, or by the rise of the loss on
them, which is what the other two stand for. The controls are the same k for every layer, and amounts drawn at random.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, lower, within

MOE = "model.blocks.moe.ffn"
LAYERS, K = 6, 4


def base():
    """6 layers of 16 experts, top-4, weights renormalised."""
    config = small_lm.get_config()
    config.model.pattern, config.model.num_layers = ("moe",), LAYERS
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 16
    ffn.select = {"kind": "top_k", "k": K, "score": "softmax_selected"}
    ffn.bank.hidden = 32
    return config


# Evaluates the run of `full`.
TRAINED = {"init.source": {"kind": "run", "arm": "full"}, "train.steps": 0, "optimizer.warmup_steps": 0}


def allotted(budget: int, **fields) -> dict:
    return {**TRAINED, f"{MOE}.kind": "allotted", "init.surgeries": {"allot": {"budget": budget, **fields}}}


def uniform(k: int) -> dict:
    return {**TRAINED, f"{MOE}.select.k": k, f"{MOE}.select.constant_gate": k == 1}


HOW = {
    "lexi": ({}, "cost from Gaussian inputs"),
    "hidden": ({"by": "hidden"}, "cost from hidden states"),
    "loss": ({"by": "loss"}, "cost from the loss itself"),
    "random": ({"by": "nothing"}, "k drawn at random"),
}
BUDGETS = (18, 9)
# The same shares of OLMoE's 128 active experts; the paper's own budget is 100.
PAPER = {12: 64, 18: 96, 9: 48}

STUDY = Study(
    slug="lexi",
    title="LExI: active experts layer by layer",
    arxiv="2509.02753",
    implements=("moejax.AllottedMoE", "moejax.Allot"),
    departures=Departures(
        scale="a small model trained here instead of released ones; 6 layers of 16 experts; budgets are the same shares as of "
        "OLMoE's 128",
        method="4 experts a token instead of 8, weights renormalised; the Gaussian inputs go to the mixture as they are, after "
        "its norm, whose learned scale they do not have",
        left_out="throughput, for which the number of active experts stands here; pruning whole experts or parts of them, the "
        "paper's control: it saves memory, and not active experts; costs relative to a layer's output, and other numbers "
        "of draws",
        capacity="none",
        optimizer="that of the model that is looked into; the method trains nothing",
        decay="that of the model that is looked into",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("full", note="as trained: k=4 in each of 6 layers"),
        Arm("uniform", uniform(2), note="k=2 in each layer"),
        Arm("random", allotted(12, **HOW["random"][0]), note="12 active experts, k drawn at random"),
        *(
            Arm(name, allotted(12, **HOW[name][0]), note=f"12 active experts, {HOW[name][1]}")
            for name in ("lexi", "hidden", "loss")
        ),
    ),
    ablations={
        "budget": (
            Arm("uniform_3", uniform(3), note="k=3 in each layer: 18 active experts"),
            *(
                Arm(f"{name}_{b}", allotted(b, **fields), note=f"{b} active experts, {note}")
                for b in BUDGETS
                for name, (fields, note) in HOW.items()
            ),
        ),
        "search": (Arm("evolution", allotted(12, search="evolution"), note="the paper's search instead of the exact one"),),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "lexi",
            "random",
            headline=True,
            text="sensitivity on noise alone tells which layers need experts",
            matched=("params",),
        ),
        lower(
            "eval/bits_per_byte",
            "lexi",
            "uniform",
            text="LExI beats the same k in every layer at equal active experts",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "lexi",
            "hidden",
            0.01,
            text="noise is as good as hidden states: no data is needed",
            matched=("params",),
        ),
        within("eval/bits_per_byte", "lexi", "loss", 0.02, text="and nearly as good as the loss itself", matched=("params",)),
        within(
            "eval/bits_per_byte",
            "evolution",
            "lexi",
            0.005,
            text="the evolutionary search finds what is best",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "lexi_18",
            "full",
            0.05,
            text="a quarter of the active experts goes at little cost",
            matched=("params",),
        ),
        lower("eval/bits_per_byte", "lexi_9", "random_9", text="it holds with 9 of 24", matched=("params",)),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # OLMoE-1B-7B: 16 layers of 64 experts, k=8.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 2048,
                "model.num_layers": 16,
                "model.vocab_size": 50_304,
                "model.tied": False,
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                f"{MOE}.num_experts": 64,
                f"{MOE}.bank.hidden": 1024,
                f"{MOE}.select": {"kind": "top_k", "k": 8},
                "data.seq_len": 4096,
                "data.batch_size": 1024,
                "train.steps": 1_220_000,
                "optimizer.learning_rate": 4e-4,
                "optimizer.warmup_steps": 2_500,
            },
            arms={
                "uniform": {f"{MOE}.select.k": 4},
                "uniform_3": {f"{MOE}.select.k": 6},
                **{name: {"init.surgeries.allot.budget": PAPER[12]} for name in (*HOW, "evolution")},
                **{f"{name}_{b}": {"init.surgeries.allot.budget": PAPER[b]} for name in HOW for b in BUDGETS},
            },
        ),
    },
    metrics=("eval/stats/experts_per_token",),
    notes="The k of each layer is in the metrics of a run, as experts_per_token of that layer.",
)
