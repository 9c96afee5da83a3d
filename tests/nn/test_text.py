"""Captions and their features."""

from __future__ import annotations

import warnings

import pytest
import torch

from vistok.errors import InvalidInputError
from vistok.nn.text import TextCondition, clean_caption, left_pad


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A Large RED circle ", "a large red circle"),
        ("see https://example.org/a.png or www.shop.net now", "see or now"),
        ("tea &amp; <b>cake</b> by @baker", "tea cake by"),
        ("a%20red+car", "a red car"),
        ("one-two-three-four-five", "one two three four five"),
        ("well-known", "well-known"),
        ("“smart” ‘quotes’ — dash", "\"smart\" 'quotes' - dash"),
        ("free shipping worldwide, page 3", "worldwide"),
        ("image 640x480 photo_01.jpg", "image"),
        ("it&#39;s a café", "it's a café"),
        ("日本 cherry", "cherry"),
        ("file.png", ""),
        ("", ""),
    ],
)
def test_captions_are_cleaned(text: str, cleaned: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption(text) == cleaned
    assert clean_caption(cleaned) == cleaned


def test_left_pad_moves_the_valid_prefix_to_the_end() -> None:
    features = torch.arange(1.0, 13.0).view(2, 3, 2)
    features[0, 2] = float("nan")  # padding may hold anything
    moved, mask = left_pad(features, torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert mask.tolist() == [[False, True, True], [False, False, True]]
    assert moved.tolist() == [[[0, 0], [1, 2], [3, 4]], [[0, 0], [0, 0], [7, 8]]]


def test_conditions_move_and_repeat() -> None:
    condition = TextCondition(torch.randn(2, 3, 4), torch.tensor([[False, True, True], [True, True, True]]))
    assert len(condition) == 2
    repeated = condition.repeat_interleave(2)
    assert torch.equal(repeated.features[0], repeated.features[1])
    assert repeated.mask is not None
    assert repeated.mask.shape == (4, 3)
    assert condition.to(dtype=torch.bfloat16).features.dtype == torch.bfloat16
    assert TextCondition(torch.randn(1, 3, 4)).repeat_interleave(3).mask is None


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (torch.zeros(2, 3, 4, dtype=torch.int64), None, "floating point"),
        (torch.zeros(3, 4), None, r"\[B, T, D\]"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), "bool"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"\[2, 3\]"),
    ],
)
def test_wrong_conditions_are_refused(features: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        TextCondition(features, mask)
