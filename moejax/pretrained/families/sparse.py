"""What families with routed experts share: their tensors, and the balance loss of transformers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from moejax.pretrained.families.decoder import OURS, THEIRS, Decoder, block_of, glu, glu_rows
from moejax.pretrained.family import Settings, published
from moejax.pretrained.table import TRANSPOSE, Row

_MATRICES = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_out"}


class SparseDecoder(Decoder):
    """A decoder with routed experts in some layers or all, under the names of OLMoE and Qwen.

    Attributes:
      hidden: the key of the experts' width.
      aux_coef: of the balance loss, where the config does not say one.
    """

    hidden: ClassVar[str] = "moe_intermediate_size"
    aux_coef: ClassVar[float] = 0.001

    def sparse_layers(self, said: Settings) -> list[bool]:
        """Which layers route."""
        step, dense = said("decoder_sparse_step", 1), said("mlp_only_layers", [])
        return [i not in dense and (i + 1) % step == 0 for i in range(said("num_hidden_layers"))]

    def moe(self, said: Settings) -> dict[str, Any]:
        """The layer that routes."""
        k = said("num_experts_per_tok")
        return {
            "kind": "moe",
            # Newer versions of transformers write the second name for all families.
            "num_experts": said("num_experts", None) or said("num_local_experts"),
            "router": {"kind": "linear"},
            "select": {"kind": "top_k", "k": k, "score": "softmax", "normalise": said("norm_topk_prob", False)},
            "bank": {"kind": "glu", "hidden": said(self.hidden), "activation": said.activation()},
            "losses": balance(said, k, self.aux_coef),
        }

    def ffns(self, said: Settings) -> tuple[tuple[str, ...], dict[str, Any]]:
        sparse = self.sparse_layers(said)
        layers = {False: ("dense", glu(said)), True: ("moe", self.moe(said))}
        pattern = tuple(layers[routed][0] for routed in sparse)
        ffns = {name: ffn for routed, (name, ffn) in layers.items() if routed in sparse}
        return (pattern[:1] if len(set(pattern)) == 1 else pattern), ffns

    def ffn_settings(self, model: Mapping[str, Any]) -> dict[str, Any]:
        moe = block_of(model, "moe")["ffn"]
        pattern = tuple(model["pattern"]) * (model["num_layers"] // len(model["pattern"]))
        dense = [i for i, name in enumerate(pattern) if name == "dense"]
        return {
            "num_experts": moe["num_experts"],
            "num_experts_per_tok": moe["select"]["k"],
            "norm_topk_prob": moe["select"].get("normalise", False),
            self.hidden: moe["bank"]["hidden"],
            "hidden_act": published(moe["bank"].get("activation", "silu")),
            **self.layer_settings(dense),
            **({"intermediate_size": block_of(model, "dense")["ffn"]["hidden"]} if dense else {}),
            **balance_settings(moe),
        }

    def layer_settings(self, dense: list[int]) -> dict[str, Any]:
        """The keys that `sparse_layers` reads, given the layers that do not route."""
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    def ffn_rows(self, model: Mapping[str, Any]) -> tuple[Row, ...]:
        dense = glu_rows(blocks=("dense",)) if "dense" in model["pattern"] else ()
        return (*moe_rows(f"{THEIRS}.mlp", _MATRICES, ("moe",)), *dense)


def moe_rows(theirs: str, names: Mapping[str, str], blocks: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """The router, and each expert's matrices; `names` are theirs and ours."""
    experts = [
        Row(f"{theirs}.experts.{{expert}}.{their}.weight", f"{OURS}/ffn/bank/{our}", TRANSPOSE, blocks)
        for their, our in names.items()
    ]
    return (Row(f"{theirs}.gate.weight", f"{OURS}/ffn/router/w", TRANSPOSE, blocks), *experts)


def balance(said: Settings, k: int, default: float) -> dict[str, Any]:
    """transformers' balance loss: of all layers at once, and k times ours, whose shares of choices sum to 1."""
    coef = said("router_aux_loss_coef", default)
    return {"balance": {"coef": coef * k, "over": "layers"}} if coef else {}


def balance_settings(moe: Mapping[str, Any]) -> dict[str, Any]:
    """The key that `balance` reads."""
    loss = (moe.get("losses") or {}).get("balance") or {"coef": 0.0}
    return {"router_aux_loss_coef": loss.get("coef", 0.01) / moe["select"]["k"]}
