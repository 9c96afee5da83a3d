"""Known tokens, and tokens that are no numbers."""

from __future__ import annotations

import pytest
import torch

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.nn.continuous import FiniteCheck, known_values
from vistok.tokens import VisualTokens

CPU = torch.device("cpu")


def test_without_a_prefix_nothing_is_known() -> None:
    features, known = known_values(None, 2, (3, 4), 5, CPU)
    assert features.shape == (2, 12, 5)
    assert not features.any()
    assert known.shape == (2, 12)
    assert not known.any()


def test_a_small_prefix_lies_in_the_top_left_corner() -> None:
    given = torch.randn(1, 4, 3)
    mask = torch.tensor([[True, True, False, True]])
    features, known = known_values(VisualTokens(features=given, grid=(2, 2), mask=mask), 1, (3, 3), 3, CPU)
    assert known[0].nonzero().flatten().tolist() == [0, 1, 4]
    assert torch.equal(features[0, [0, 1, 4]], given[0, [0, 1, 3]])
    assert not features[0][~known[0]].any()


def test_unknown_tokens_may_be_anything_and_known_ones_may_not() -> None:
    given = torch.zeros(1, 4, 3)
    given[0, 2] = float("nan")
    mask = torch.tensor([[True, True, False, True]])
    features, _ = known_values(VisualTokens(features=given, grid=(2, 2), mask=mask), 1, (2, 2), 3, CPU)
    assert torch.isfinite(features).all()
    with pytest.raises(InvalidInputError, match="prefix contains NaN"):
        known_values(VisualTokens(features=given, grid=(2, 2)), 1, (2, 2), 3, CPU)


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (VisualTokens(features=torch.zeros(2, 4, 3), grid=(2, 2)), "features of 1 images with a grid; got 2 images"),
        (VisualTokens(features=torch.zeros(1, 4, 3)), "grid None"),
        (VisualTokens(ids=torch.zeros(1, 4, dtype=torch.int64), grid=(2, 2)), "features missing"),
        (VisualTokens(features=torch.zeros(1, 6, 3), grid=(3, 2)), "3x2 tokens of 3 channels; expected at most 2x2"),
        (VisualTokens(features=torch.zeros(1, 4, 5), grid=(2, 2)), "tokens of 5 channels; expected at most 2x2"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(prefix: VisualTokens, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        known_values(prefix, 1, (2, 2), 3, CPU)


def test_tokens_must_be_numbers() -> None:
    check = FiniteCheck(CPU)
    check(torch.zeros(2, 3), last=False)
    with pytest.raises(InvalidOutputError, match="NaN or infinite tokens"):
        check(torch.tensor([1.0, float("inf")]), last=False)
    with pytest.raises(InvalidOutputError):  # earlier ones are not forgotten
        check(torch.zeros(2, 3), last=True)
