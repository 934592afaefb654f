"""PEER (He 2024): a layer of very many experts of one hidden unit each, found by product keys.

Byte language models in which every other feed-forward layer is replaced. Product-key arms, but for the group that says so,
compute 32 hidden units per token in that layer; PEER and PKM choose them among 4,096. Finding them costs as much as 82 further units,
which `dense` and the coarse mixtures have instead. Quality, and how many experts are used.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, above, higher, lower, within

MOE = "model.blocks.moe.ffn"
PEER = {"kind": "product_keys", "num_keys": 64, "heads": 4, "k": 8, "query_dim": 32}


def peer(**fields) -> dict:
    """A product-key layer with 32 active units of 4,096 unless `fields` say otherwise."""
    return {MOE: {**PEER, **fields}}


def dense(hidden: int) -> dict:
    return {MOE: {"kind": "ffn", "hidden": hidden}}


def coarse(num_experts: int, k: int, hidden: int) -> dict:
    """A mixture of few, wider experts."""
    return {
        f"{MOE}.num_experts": num_experts,
        f"{MOE}.select.k": k,
        f"{MOE}.bank": {"kind": "ffn", "hidden": hidden},
    }


def large(**fields) -> dict:
    """The paper's layer, 128 active units of a million, unless `fields` say otherwise."""
    return peer(**{"num_keys": 1024, "heads": 8, "k": 16, "query_dim": 256, **fields})


COARSE = coarse(128, 1, 1792) | {f"{MOE}.select.normalise": False}

STUDY = Study(
    slug="peer",
    title="PEER: a million experts of one neuron",
    arxiv="2407.04153",
    implements=("moejax.ProductKeys",),
    departures=Departures(
        scale="bytes, one epoch and 64^2 experts instead of 1024^2, in two layers of four instead of one in the middle",
        method="32 active units instead of 128; the coarse mixture is token choice, since expert choice leaks the future; usage "
        "is that of the last training batches",
        left_out="isoFLOP curves, and the evaluation on other corpora",
        capacity="the coarse mixture drops nothing, where the paper's expert choice has a fixed room",
        optimizer="the base's rates here; those of the paper preset are ours. The dense optimizer also moves experts that nobody "
        "picked (weight decay, momentum)",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=small_lm.get_config(),
    arms=(
        Arm("dense", dense(114), note="as many active parameters as peer has, its queries and keys among them"),
        Arm("moe", coarse(16, 2, 52), note="top-2 of 16 experts, balance 1e-2, as many active parameters"),
        Arm("pkm", peer(values_only=True), note="product-key memory: 32 of 4,096 values, softmax"),
        Arm("peer", peer(), note="32 of 4,096 experts (4 heads of 8), queries normalised over the batch"),
        Arm("no_norm", peer(query_norm="none"), note="peer without normalising queries"),
    ),
    ablations={
        "experts": tuple(Arm(f"n_{n * n}", peer(num_keys=n), note=f"{n * n} experts") for n in (16, 32, 128)),
        "active": (
            Arm("active_8", peer(heads=4, k=2), note="8 active experts"),
            Arm("active_128", peer(heads=8, k=16), note="128 active experts, the paper's"),
        ),
        "heads": (
            Arm(
                "heads_1",
                peer(heads=1, k=32, query_dim=80),
                note="32 active experts, one longer query: as many active parameters",
            ),
            Arm("heads_16", peer(heads=16, k=2), note="32 active experts, 16 queries"),
        ),
        "norm": (Arm("layer_norm", peer(query_norm="layer"), note="queries normalised one by one: strictly causal"),),
        "score": (
            Arm("relu_score", peer(score="relu"), note="scores that do not compete, as in the common port"),
            Arm("pkm_relu", peer(values_only=True, score="relu"), note="memory with scores that do not compete"),
        ),
        "granularity": (
            Arm("moe_k1", coarse(8, 1, 104) | {f"{MOE}.select.normalise": False}, note="the same as moe, in one of 8 experts"),
            Arm("moe_k4", coarse(32, 4, 26), note="the same as moe, in 4 of 32 experts"),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "peer",
            "dense",
            headline=True,
            text="PEER beats the dense layer of equal compute",
            matched=("flops", "active_params"),
        ),
        lower(
            "eval/bits_per_byte",
            "peer",
            "moe",
            text="PEER beats a coarse mixture of equal compute",
            matched=("flops", "active_params"),
        ),
        lower("eval/bits_per_byte", "peer", "pkm", text="experts beat memory values", matched=("flops", "active_params")),
        above("eval/stats/usage", "peer", 0.95, text="nearly all experts are used"),
        lower(
            "eval/stats/unevenness", "peer", "no_norm", text="query batch norm evens out the usage", matched=("flops", "params")
        ),
        lower("eval/bits_per_byte", "peer", "no_norm", text="query batch norm lowers the loss", matched=("flops", "params")),
        higher(
            "eval/bits_per_byte",
            "n_256",
            "peer",
            text="more experts at fixed active width are better",
            matched=("flops", "active_params"),
        ),
        lower("eval/bits_per_byte", "active_128", "peer", text="more active experts are better", matched=("params",)),
        lower(
            "eval/bits_per_byte",
            "peer",
            "heads_1",
            text="many heads of few experts beat one head of many",
            matched=("active_params", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "layer_norm",
            "peer",
            0.02,
            text="normalising queries one by one, which is strictly causal, is a practical substitute",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "pkm_relu",
            "pkm",
            text="memory prefers scores that do not compete (sigma-MoE)",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "moe_k4",
            "moe_k1",
            text="smaller experts beat larger ones at equal active and total parameters",
            matched=("flops", "active_params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1024,
                "model.num_layers": 12,
                "model.pattern": (*("dense",) * 5, "moe", *("dense",) * 6),
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 2816,
                "data.seq_len": 2048,
                "data.batch_size": 128,
                "train.steps": 20_000,
                "optimizer.learning_rate": 3e-4,
                "optimizer.warmup_steps": 1_000,
            },
            arms={
                "dense": dense(1792),
                "moe": COARSE,
                "pkm": large(k=32, values_only=True),
                "peer": large(),
                "no_norm": large(query_norm="none"),
                # Ratios to `peer` are those of the small scale.
                "n_256": large(num_keys=256),
                "n_1024": large(num_keys=512),
                "n_16384": large(num_keys=2048),
                "active_8": large(k=4),
                "active_128": large(heads=16, k=32),
                "heads_1": large(heads=1, k=128),
                "heads_16": large(heads=16, k=8),
                "layer_norm": large(query_norm="layer"),
                "relu_score": large(score="relu"),
                "pkm_relu": large(k=32, values_only=True, score="relu"),
                "moe_k1": COARSE,
                "moe_k4": coarse(512, 4, 448),
            },
        ),
    },
    metrics=("eval/stats/usage", "eval/stats/unevenness"),
)
