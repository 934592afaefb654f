"""Hash layers (Roller et al. 2021): a fixed function of the token's id picks the expert, and nothing is learnt about routing.

Byte language models with one mixture of 8 experts, in the third of four blocks; a token uses one expert, and every arm but
`dense_wide` computes what `dense` does. `switch` learns its router with a balance loss; `hash` gives out the 256 byte values by
their frequency in the training data so that all experts get equal shares of it.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import SMOKE, Arm, Preset, Study, higher, lower, within

MOE = "model.blocks.moe.ffn"
FREQUENCIES = {"from_data": "token_frequencies", "batches": 64}


def clusters(count: int) -> dict:
    return {"from_data": "token_clusters", "clusters": count, "batches": 64}


def base():
    """The third of four blocks has 8 experts, with a balanced hash."""
    config = small_lm.get_config()
    config.model.pattern = ("dense", "dense", "moe", "dense")
    config.model.blocks.dense.ffn = {"kind": "ffn", "activation": "relu", "hidden": 256}
    ffn = config.model.blocks.moe.ffn
    ffn.router = {"kind": "hash", "hash": "balanced", "frequencies": FREQUENCIES}
    ffn.select = {"kind": "top_k", "k": 1}
    ffn.bank = {"kind": "ffn", "activation": "relu", "hidden": 256}
    ffn.losses = {}
    return config


def hashed(kind: str, **fields) -> dict:
    return {f"{MOE}.router": {"kind": "hash", "hash": kind, **fields}}


SWITCH = {f"{MOE}.router": {"kind": "linear"}, f"{MOE}.losses": {"balance": {"coef": 1e-2, "over": "batch"}}}

STUDY = Study(
    slug="hash_layers",
    title="Hash layers",
    arxiv="2106.04426",
    implements=("moejax.Hash", "moejax.MultiHash", "moejax.data.token_frequencies", "moejax.data.token_clusters"),
    departures=Departures(
        scale="bytes instead of words, so that a hash is coarse (a space is one sixth of all tokens); 8 experts instead of 64; "
        "batch size and sequence length of the paper preset are ours",
        method="clusters are of vectors of co-occurrence in the training data instead of the embeddings of a trained model, and "
        "what a bigram model predicts stands for what a small dense model would; clusters are as many as experts",
        left_out="the encoder, experts in several layers, the comparison with BASE, and updates per second",
        capacity="none",
        optimizer="AdamW with a cosine here; the paper's rate and inverse square root in the paper preset",
        decay="0.1 in both presets; the paper's is not known to us",
        init="the library's; the paper's is not known to us",
    ),
    base=base(),
    arms=(
        Arm("dense", {"model.pattern": ("dense",)}, note="no experts"),
        Arm("switch", SWITCH, note="8 experts, learnt top-1 with a balance loss"),
        Arm("hash", note="8 experts by a balanced hash of the byte"),
        Arm("hash_random", hashed("random"), note="by a random hash of the byte"),
    ),
    ablations={
        "hash": (
            Arm("dispersed", hashed("dispersed", clusters=clusters(8)), note="similar bytes to different experts"),
            Arm("clustered", hashed("clustered", clusters=clusters(8)), note="similar bytes to one expert"),
            Arm("previous", hashed("previous"), note="by the byte before"),
            Arm("bigram", hashed("bigram"), note="by the byte and the one before"),
            Arm("position", hashed("position"), note="by position"),
            Arm(
                "predicted",
                hashed("predicted", successors={"from_data": "token_successors", "batches": 64}),
                note="by the byte that usually follows",
            ),
            Arm("oracle", hashed("next", leak=True), note="by the byte that is to be predicted: a bound, and a leak"),
        ),
        "experts": (
            Arm("hash_e32", {f"{MOE}.num_experts": 32}, note="32 experts, balanced hash"),
            Arm("switch_e32", SWITCH | {f"{MOE}.num_experts": 32}, note="32 experts, learnt"),
        ),
        "multi": (
            Arm(
                "multi_2",
                {MOE: {"kind": "multi_hash", "num_experts": 8, "hidden": 256, "hashes": 2}},
                note="MultiHash, 2 hashes",
            ),
            Arm(
                "multi_4",
                {MOE: {"kind": "multi_hash", "num_experts": 8, "hidden": 256, "hashes": 4}},
                note="MultiHash, 4 hashes",
            ),
        ),
        "parameters": (
            Arm(
                "dense_deep",
                {"model.pattern": ("dense",), "model.num_layers": 9},
                note="as many parameters in five blocks more",
            ),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "hash",
            "switch",
            headline=True,
            text="a balanced hash beats a learnt router",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "hash", "dense", text="and the dense model of the same compute", matched=("flops",)),
        within(
            "eval/bits_per_byte",
            "hash",
            "hash_random",
            0.02,
            text="a random hash is about as good as a balanced one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/stats/max_violation", "hash", "hash_random", text="the balanced hash balances", matched=("flops", "params")
        ),
        within(
            "eval/bits_per_byte",
            "dispersed",
            "hash",
            0.02,
            text="dispersed hashing is about as good as well",
            matched=("flops", "params"),
        ),
        higher(
            "eval/bits_per_byte", "clustered", "hash", text="similar tokens are better kept apart", matched=("flops", "params")
        ),
        higher(
            "eval/bits_per_byte",
            "previous",
            "hash",
            text="the current token beats the previous one",
            matched=("flops", "params"),
        ),
        higher("eval/bits_per_byte", "bigram", "hash", text="and bigrams", matched=("flops", "params")),
        higher("eval/bits_per_byte", "position", "previous", text="position is the worst", matched=("flops", "params")),
        higher(
            "eval/bits_per_byte",
            "predicted",
            "hash",
            text="a predicted next token is no better than the current one",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte",
            "oracle",
            "hash",
            by=0.5,
            text="the next token's hash gives an absurdly low loss",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "hash_e32", "hash", text="more experts help", matched=("flops",)),
        lower("eval/bits_per_byte", "multi_2", "hash_random", text="MultiHash adds a little", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "dense_deep",
            "hash",
            text="a deeper dense model of as many parameters is better, at more compute (22.72 against 23.16 in the paper)",
            matched=("params",),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # 751M parameters: 64 experts at layer 7 of 8; a decoder.
        "paper": Preset(
            {
                "model.d_model": 1024,
                "model.num_layers": 8,
                "model.pattern": (*("dense",) * 6, "moe", "dense"),
                **{f"model.blocks.{b}.mixer.{key}": 16 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                **dict.fromkeys(("model.blocks.dense.ffn.hidden", f"{MOE}.bank.hidden"), 4096),
                f"{MOE}.num_experts": 64,
                "model.vocab_size": 8_192,
                "model.dtype": "bfloat16",
                "data.name": "c4",
                "data.domains": None,
                "data.seq_len": 128,
                "data.batch_size": 1024,
                "train.steps": 100_000,
                "train.log_every": 100,
                "optimizer.learning_rate": 2e-3,
                "optimizer.warmup_steps": 10_000,
                "optimizer.schedule": "rsqrt",
                "eval.every": 5_000,
                "checkpoint.every": 1_000,
            },
            arms={
                "dispersed": {f"{MOE}.router.clusters.clusters": 64},
                "clustered": {f"{MOE}.router.clusters.clusters": 64},
                **{name: {f"{MOE}.num_experts": 128} for name in ("hash_e32", "switch_e32")},
                **{name: {f"{MOE}.num_experts": 64, f"{MOE}.hidden": 4096} for name in ("multi_2", "multi_4")},
                "dense_deep": {"model.num_layers": 50},
            },
        ),
    },
    metrics=("eval/stats/max_violation",),
    notes="With 256 byte values, 'hash' is close to a table of which expert handles which letters. Tokens are counted in 64 batches of the "
    "training split when a training begins.",
)
