"""The matrix tries what it says: methods whose abilities are known get the cells they must."""

import pytest

from experiments import matrix
from experiments.study import load, resolve


@pytest.mark.slow
def test_token_choice_with_capacity() -> None:
    """Switch evaluates with a capacity, so its tokens are planned together and cannot be decoded one by one."""
    cells = matrix.examine(load("switch"))
    assert {name: cell.text for name, cell in cells.items()} == {
        "LM": "yes",
        "ViT": "yes",
        "backends": "reference, einsum, capacity, grouped, gather",
        "8 devices": "experts",
        "causal": "yes",
        "decode": "no",
    }
    (reason,) = matrix.reasons(cells)
    assert reason.startswith(
        "decode: this model cannot be decoded token by token: model.blocks.moe.ffn: TopK plans several tokens"
    )
    shown = matrix.table({"switch": cells})
    assert shown.rows == (("switch", *(cells[column].text for column in matrix.COLUMNS)),)


@pytest.mark.slow
def test_soft_slots_are_refused_in_a_decoder() -> None:
    cells = matrix.examine(load("soft_moe"))
    assert [cells[name].text for name in ("LM", "ViT", "causal", "decode")] == ["no", "yes", "no", "no"]
    assert "leaks the future in a decoder" in cells["LM"].why


def test_causality_and_decoding_are_found_by_running() -> None:
    """With models that only pretend."""

    class Model:
        vocab_size = 7

    def sees_the_future(_, tokens, train):
        return (tokens + tokens.sum(1, keepdims=True) * (2 if train else 1))[..., None].astype("float32")

    def in_training(_, tokens, train):
        return (tokens + tokens.sum(1, keepdims=True) * (1 if train else 0))[..., None].astype("float32")

    assert matrix._causal(Model(), None, sees_the_future) == "no"
    assert matrix._causal(Model(), None, in_training) == "at inference"
    assert matrix._causal(Model(), None, lambda _, tokens, train: tokens[..., None].astype("float32")) == "yes"


@pytest.mark.slow
def test_experts_that_no_mesh_of_eight_divides_stay_together() -> None:
    cell = matrix._split(matrix._small(resolve(load("smear"), "smoke", "smear")))
    assert cell.text == "parameters"
    assert "'expert' of size 3 does not divide" in cell.why
