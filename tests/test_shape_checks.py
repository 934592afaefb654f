"""The run-time checks that all other tests run under find what they are there to find."""

from typing import Any

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float
from shape_checks import checked

from moejax.routing.capacity import compute_capacity

Matrix = Float[np.ndarray, "n d"]


@checked
def product(
    x: Matrix, w: Float[np.ndarray, "d f"], /, scale: float = 1, *more: int, wrong: bool = False, **names: str
) -> Matrix:
    return scale * (x @ w)[:, : -1 if wrong else None] + sum(more)


def test_what_fits_passes() -> None:
    x, w = np.ones((3, 2)), np.ones((2, 2))
    np.testing.assert_array_equal(product(x, w, 2, 1, name="a"), np.full((3, 2), 5.0))
    np.testing.assert_array_equal(product(x, w), np.full((3, 2), 2.0))
    product(np.ones((5, 4)), np.ones((4, 4)))  # letters are those of one call


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((np.ones((3, 2)), np.ones((3, 2))), {}),  # d is 2 and 3
        ((np.ones((3, 2)), np.ones((2, 2))), {"wrong": True}),  # what comes out: n d
        ((np.ones((3, 2)), np.ones((2, 5))), {}),
        ((np.ones(3), np.ones((2, 2))), {}),
        ((np.ones((3, 2), int), np.ones((2, 2))), {}),
        ((np.ones((3, 2)), np.ones((2, 2)), "2"), {}),
        ((np.ones((3, 2)), np.ones((2, 2)), 1, 1.5), {}),
        ((np.ones((3, 2)), np.ones((2, 2))), {"name": 1}),
    ],
)
def test_what_does_not_is_refused(args: tuple[Any, ...], names: dict[str, Any]) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        product(*args, **names)


def test_functions_of_one_piece_of_code_have_checks_of_their_own_where_their_annotations_differ() -> None:
    def made(hint: Any) -> Any:
        @checked
        def inner(x: hint) -> hint:
            return x

        return inner

    assert [made(int)(1), made(str)("a"), made(int)(2)] == [1, "a", 2]
    for hint, value in ((str, 1), (int, "a"), ("Matrix", np.ones(3))):
        with pytest.raises(BeartypeCallHintViolation):
            made(hint)(value)
    assert made("NoSuchName")(1) == 1, "what nobody can resolve is not checked"


def test_the_library_is_checked() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="num_tokens"):
        compute_capacity("8", num_experts=4, k=1, factor=1.0)
