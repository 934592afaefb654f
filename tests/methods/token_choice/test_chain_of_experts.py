"""Chain of experts against NumPy: iterations over one bank, their routers, residuals, losses and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_layers import close, compiled, draw, glu, weighted_experts
from numpy_routing import combine, softmax, top_k

from moejax import GLU, Balance, ConfigError, Context, Linear, TopK
from moejax.core.initializers import FanIn
from moejax.layers import ChainOfExperts, MoE, RMSNorm
from moejax.layers.registry import ffns

B, S, D, E, C = 2, 5, 6, 4, 3
VALID = np.array([[True] * S, [True, True, True, False, False]])


def layer(**fields) -> ChainOfExperts:
    fields = dict(backend="reference", losses=(Balance(0.5),), iterations=C) | fields
    return ChainOfExperts(Linear(E, init_w=FanIn(1.0)), TopK(k=2), GLU(3, num_experts=E), **fields)


def numpy_chain(params, x: np.ndarray, valid: np.ndarray, gating: str, residual: str, shared: int = 0, norm: bool = False):
    """One sequence: the output, and each iteration's probabilities and combine matrix."""
    x, routed = np.asarray(x, np.float64), []
    state = x
    for t in range(C):
        h = state
        if norm and t:
            h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params[f"norm_{t}"]["norm"]["scale"])
        if gating == "own" or t == 0:
            logits = h @ np.asarray(params["router" if gating == "shared" else f"router_{t}"]["w"], np.float64)
        expert, weight = top_k(logits, 2)
        plan = combine(expert, weight, np.repeat(valid[:, None], 2, 1), E)
        routed.append((softmax(logits), plan))
        y = weighted_experts(params["bank"], plan, h) + sum(glu(params["shared"], j, h) for j in range(shared))
        state = y + state if residual == "inner" else y
    return (state + x if residual == "outer" else state), routed


@pytest.mark.parametrize(
    ("fields", "shared"),
    [({}, 2), ({"gating": "shared"}, 0), ({"residual": "outer"}, 0), ({"residual": "none", "norm": RMSNorm()}, 0)],
    ids=["paper", "shared_gating", "outer_residual", "normed"],
)
def test_it_is_numpys(rng: np.random.Generator, fields: dict, shared: int) -> None:
    chain = layer(**fields, shared=GLU(3, num_experts=shared) if shared else None)
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    variables = draw(chain, x)
    y, sown = compiled(chain, "losses", "stats")(variables, x, Context(valid=jnp.asarray(VALID), train=True))
    rows = [
        numpy_chain(variables["params"], x[i], VALID[i], chain.gating, chain.residual, shared, chain.norm is not None)
        for i in range(B)
    ]
    np.testing.assert_allclose(y, np.stack([row[0] for row in rows]), rtol=1e-4, atol=1e-4)
    # Nothing that one iteration sows hides what another one does.
    loads = [np.asarray(sown["stats"][f"iteration_{t}"]["load"]) for t in range(C)]
    for t in range(C):
        probs, plans = (np.concatenate([row[1][t][i][VALID[j]] for j, row in enumerate(rows)]) for i in (0, 1))
        share = (plans > 0).sum(0) / (plans > 0).sum()
        np.testing.assert_allclose(loads[t], share, rtol=1e-5)
        per_group = [
            E * (row[1][t][0][VALID[j]].mean(0) * (row[1][t][1][VALID[j]] > 0).mean(0) / 2).sum() for j, row in enumerate(rows)
        ]
        expected = 0.5 * np.average(per_group, weights=VALID.sum(1))
        np.testing.assert_allclose(sown["losses"][f"iteration_{t}"]["balance_loss"], expected, rtol=1e-4)
        np.testing.assert_allclose(sown["stats"][f"iteration_{t}"]["importance"], probs.mean(0), rtol=1e-4)
    assert chain.gating == "shared" or len({tuple(load) for load in loads}) > 1


def test_only_routers_are_new_parameters() -> None:
    def shapes(model) -> dict:
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((B, S, D)))["params"]

    chain = layer(shared=GLU(3))
    moe = MoE(Linear(E), TopK(k=2), GLU(3, num_experts=E), shared=GLU(3))
    own, plain = shapes(chain), shapes(moe)
    assert sorted(own) == ["bank", "router_0", "router_1", "router_2", "shared"]
    assert (own["bank"], own["shared"]) == (plain["bank"], plain["shared"])
    assert sorted(shapes(layer(gating="shared"))) == ["bank", "router"]
    assert chain.active_fraction() == 1.0
    assert layer(iterations=1).active_fraction() == 0.5


def test_one_iteration_without_residual_is_a_mixture(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
    chain = layer(iterations=1, residual="none")
    variables = draw(chain, x)
    params = {"bank": variables["params"]["bank"], "router": variables["params"]["router_0"]}
    moe = MoE(chain.router, chain.select, chain.bank, backend="reference")
    close(compiled(chain)(variables, x), compiled(moe)({"params": params}, x))


def test_it_decodes_and_is_causal_exactly_where_its_rule_is() -> None:
    layer().check_causal("ffn")
    assert layer().decodable() is None
    rule = {"kind": "top_k", "k": 2, "capacity_factor": 1.0, "priority": "score"}
    spec = {"kind": "chain_of_experts", "num_experts": E, "router": {"kind": "linear"}, "bank": {"kind": "glu", "hidden": 3}}
    scored = ffns.build({**spec, "select": rule}, "ffn")
    with pytest.raises(ConfigError, match=r"ffn\.select \(TopK\) selects over later tokens"):
        scored.check_causal("ffn")
    assert "TopK plans several tokens together" in scored.decodable()


@pytest.mark.parametrize("fields", [{"iterations": 0}, {"gating": "own_"}, {"residual": "both"}])
def test_bad_settings_raise(fields: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(fields))}="):
        layer(**fields)
