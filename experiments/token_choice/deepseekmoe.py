"""DeepSeekMoE (Dai et al. 2024): many narrow experts, some of them shared by all tokens.

Byte language models. The coarse mixture (`gshard`) has 4 experts of width 128, two per token. `deepseekmoe` cuts each expert into
four: 16 of width 32, of which one is shared and 7 of the other 15 are routed, which is the same number of parameters and of
active parameters. A shared expert counts among the active ones.

The paper's probes of a trained model are evaluations in which experts are left out: `masked` passes over each token's 4 best of 15
routed experts, `gshard_1.5_masked` over the best of 4, `shared_removed` over the shared one, with one more routed instead. Each of
these arms trains anew what its sound twin trains.
"""

from configs import small_lm
from experiments.departures import Departures
from experiments.study import PAPER_LM, SMOKE, Arm, Preset, Study, changes_less, higher, lower, within

MOE = "model.blocks.moe.ffn"


def base():
    """Every other feed-forward layer: 15 routed experts of width 32, 7 active, one shared."""
    config = small_lm.get_config()
    config.model.blocks.dense.ffn = {"kind": "ffn", "hidden": 256}
    ffn = config.model.blocks.moe.ffn
    ffn.num_experts = 15
    ffn.select = {"kind": "top_k", "k": 7}
    ffn.bank = {"kind": "ffn", "hidden": 32}
    ffn.shared = {"kind": "ffn", "hidden": 32}
    return config


def mixture(experts: int, k: int, hidden: int, shared: int = 0, **select) -> dict:
    """`experts` in all, of which `shared` are shared; k active ones, the shared among them."""
    return {
        f"{MOE}.num_experts": experts - shared,
        f"{MOE}.select": {"kind": "top_k", "k": k - shared, **select},
        f"{MOE}.bank.hidden": hidden,
        f"{MOE}.shared": {"kind": "ffn", "hidden": hidden * shared} if shared else None,
    }


def gshard(hidden: int) -> dict:
    return mixture(4, 2, hidden, normalise=True)


def evaluate(**select) -> dict:
    """A trained model under another rule."""
    return {f"{MOE}.eval_select": {"kind": "top_k", **select}}


WITHOUT_SHARED = {f"{MOE}.shared": {"kind": "train_only", "bank": {"kind": "ffn", "hidden": 32}}}

STUDY = Study(
    slug="deepseekmoe",
    title="DeepSeekMoE: fine-grained and shared experts",
    arxiv="2401.06066",
    implements=("moejax.MoE", "moejax.TopK", "moejax.Balance", "moejax.DeviceBalance"),
    departures=Departures(
        scale="bytes and one epoch; experts of one coarse expert's quarter, 4 coarse experts instead of 16",
        method="numbers of masked experts and of devices are as much smaller as the number of experts",
        left_out="the random second expert of GShard; the 16B and 145B models, which are configs "
        "(configs/pods/deepseek_moe_16b.py) and no arms; the gates of DeepSeek-V2 and V3, which `sigmoid_gating` and "
        "`aux_loss_free` study",
        capacity="none",
        optimizer="a cosine instead of two steps down by 0.316 at 80 and 90 %; the base's rates here",
        decay="none",
        init="the library's instead of a standard deviation of 0.006",
    ),
    base=base(),
    arms=(
        Arm(
            "dense",
            {"model.pattern": ("dense",)},
            note="a dense layer of the same active width (the published one has half of it)",
        ),
        Arm("gshard", gshard(128), note="4 experts of width 128, top-2"),
        Arm("fine", mixture(16, 8, 32), note="16 of width 32, top-8, none shared"),
        Arm("deepseekmoe", note="15 of width 32, top-7, and one shared"),
        Arm("gshard_1.5", gshard(192), note="gshard with 1.5 times the expert parameters and compute"),
    ),
    ablations={
        "segmentation": (
            Arm("m2", mixture(8, 4, 64, 1), note="each expert in two, one shared"),
            Arm("m2_fine", mixture(8, 4, 64), note="each expert in two, none shared"),
            Arm("m8", mixture(32, 16, 16, 1), note="each expert in eight, one shared"),
        ),
        "shared": (
            Arm("shared_2", mixture(16, 8, 32, 2), note="2 shared, 6 routed active"),
            Arm("shared_4", mixture(16, 8, 32, 4), note="4 shared, 4 routed active"),
        ),
        "redundancy": (
            Arm("masked", evaluate(k=7, skip=4), note="evaluated without each token's 4 best routed experts"),
            Arm(
                "gshard_1.5_masked", gshard(192) | evaluate(k=2, skip=1, normalise=True), note="without each token's best of 4"
            ),
            Arm(
                "shared_removed", WITHOUT_SHARED | evaluate(k=8), note="evaluated with an 8th routed expert for the shared one"
            ),
        ),
        "active": (
            Arm("active_4", evaluate(k=4), note="trained with 7 routed experts, evaluated with 4"),
            Arm("half", {f"{MOE}.select.k": 3}, note="trained and evaluated with 3 routed experts and the shared one"),
        ),
        "baselines": (
            Arm(
                "switch",
                mixture(4, 1, 128),
                note="one of 4 experts of width 128: equal parameters, half of the experts' compute",
            ),
            Arm("dense_16", {MOE: {"kind": "ffn", "hidden": 512}}, note="all experts for all tokens"),
        ),
        "balance": (
            Arm("unbalanced", {f"{MOE}.losses.balance": None}, note="no balance loss"),
            Arm("per_sequence", {f"{MOE}.losses.balance.over": "group"}, note="balance in each sequence, as released"),
            Arm(
                "per_device",
                {f"{MOE}.losses": {"device_balance": {"coef": 1e-2, "devices": 3, "over": "batch"}}},
                note="3 devices",
            ),
        ),
    },
    claims=(
        lower(
            "eval/bits_per_byte",
            "deepseekmoe",
            "gshard",
            headline=True,
            text="better at equal parameters and compute",
            matched=("flops", "params"),
        ),
        lower("eval/bits_per_byte", "fine", "gshard", text="finer experts help by themselves", matched=("flops", "params")),
        lower(
            "eval/bits_per_byte",
            "deepseekmoe",
            "fine",
            text="and so does isolating a shared expert",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "deepseekmoe",
            "gshard_1.5",
            0.02,
            text="equals GShard with half more expert parameters",
            matched=(),
        ),
        lower(
            "eval/bits_per_byte",
            "deepseekmoe",
            "dense",
            text="better than the dense model of the same active width",
            matched=("flops", "active_params"),
        ),
        lower("eval/bits_per_byte", "fine", "m2_fine", text="16 narrow experts beat 8", matched=("flops", "params")),
        within(
            "eval/bits_per_byte",
            "shared_2",
            "deepseekmoe",
            0.02,
            text="how many of the active experts are shared hardly matters",
            matched=("flops", "params"),
        ),
        changes_less(
            "eval/bits_per_byte",
            ("gshard_1.5", "gshard_1.5_masked"),
            ("deepseekmoe", "masked"),
            text="less redundant: losing the best quarter of routed experts hurts it more than GShard",
            matched=(),
        ),
        higher(
            "eval/bits_per_byte",
            "shared_removed",
            "deepseekmoe",
            by=0.05,
            text="no routed expert stands in for the shared one",
            matched=("flops", "params"),
        ),
        within(
            "eval/bits_per_byte",
            "active_4",
            "gshard",
            0.02,
            text="4 routed experts at inference are enough to match GShard",
            matched=("flops", "params"),
        ),
        lower(
            "eval/bits_per_byte", "half", "gshard", text="half the active experts, trained so, still beat GShard", matched=()
        ),
        lower(
            "eval/bits_per_byte",
            "deepseekmoe",
            "switch",
            text="better than Switch at equal parameters (1.808 against 1.881 on the Pile)",
            matched=("params",),
        ),
        within(
            "eval/bits_per_byte",
            "deepseekmoe",
            "dense_16",
            0.02,
            text="nearly the dense model of as many parameters (1.808 against 1.806)",
            matched=("params",),
        ),
        lower(
            "eval/stats/max_violation",
            "deepseekmoe",
            "unbalanced",
            text="the balance loss balances",
            matched=("flops", "params"),
        ),
    ),
    presets={
        "smoke": SMOKE,
        "cpu": Preset(),
        # The paper's 2B models: 9 layers, every one a mixture; standard width 5120, experts a quarter of it.
        "paper": Preset(
            {
                **PAPER_LM,
                "model.d_model": 1280,
                "model.num_layers": 9,
                "model.pattern": ("moe",),
                **{f"model.blocks.{b}.mixer.{key}": 10 for b in ("dense", "moe") for key in ("num_heads", "num_kv_heads")},
                "model.blocks.dense.ffn.hidden": 10_240,
                f"{MOE}.num_experts": 63,
                f"{MOE}.bank.hidden": 1280,
                f"{MOE}.shared.hidden": 1280,
                "model.vocab_size": 8192,
                "data.seq_len": 2048,
                "data.batch_size": 2048,
                "train.steps": 25_000,
                "optimizer.learning_rate": 1.08e-3,
                "optimizer.warmup_steps": 2_000,
            },
            arms={
                "gshard": mixture(16, 2, 5120, normalise=True),
                "gshard_1.5": mixture(16, 2, 7680, normalise=True),
                "gshard_1.5_masked": mixture(16, 2, 7680, normalise=True) | evaluate(k=2, skip=4, normalise=True),
                "fine": mixture(64, 8, 1280),
                "m2": mixture(32, 4, 2560, 1),
                "m2_fine": mixture(32, 4, 2560),
                "m8": mixture(128, 16, 640, 1),
                "shared_2": mixture(64, 8, 1280, 2),
                "shared_4": mixture(64, 8, 1280, 4),
                "masked": evaluate(k=7, skip=16),
                "shared_removed": {f"{MOE}.shared.bank.hidden": 1280},
                "switch": mixture(16, 1, 5120),
                "dense_16": {f"{MOE}.hidden": 81920},
                "per_device": {f"{MOE}.losses.device_balance.devices": 7},
            },
        ),
    },
    metrics=("eval/stats/max_violation",),
    notes="Arms of the groups 'redundancy' and 'active' differ from their twins in evaluation only.",
)
