"""Conditions that generators refuse."""

from __future__ import annotations

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.nn.conditions import check_labels, check_text
from vistok.nn.text import TextCondition


def test_labels_pass_as_they_are() -> None:
    labels = torch.tensor([0, 9, 3])
    assert check_labels(labels, 10, "Model") is labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 2], r"this Model is class-conditional: .* not list"),
        (torch.tensor([1.0]), r"not torch\.float32 \[1\]"),
        (torch.tensor([[1]]), r"not torch\.int64 \[1, 1\]"),
        (torch.zeros(0, dtype=torch.int64), "at least one"),
        (torch.tensor([3, 10]), r"lie in 0\.\.9; got 3\.\.10"),
        (torch.tensor([-1, 2]), r"lie in 0\.\.9; got -1\.\.2"),
        (TextCondition(torch.zeros(1, 2, 3)), "not TextCondition"),
    ],
)
def test_wrong_labels_are_refused(labels: object, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_labels(labels, 10, "Model")


def test_text_features_pass_as_they_are() -> None:
    condition = TextCondition(torch.zeros(2, 4, 3))
    assert check_text(condition, 4, 3, "Model") is condition


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (torch.tensor([1]), r"this Model is text-conditional: give a TextCondition .* not Tensor"),
        (TextCondition(torch.zeros(2, 5, 3)), r"must be \[B, 4, 3\] for this model; got \[2, 5, 3\]"),
        (TextCondition(torch.zeros(0, 4, 3)), "at least one caption"),
        (TextCondition(torch.full((1, 4, 3), float("nan"))), "no NaN or infinity"),
    ],
)
def test_wrong_text_features_are_refused(condition: object, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        check_text(condition, 4, 3, "Model")
