"""Randomness and choice of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.nn import sampling


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_list_of_generators_makes_images_independent() -> None:
    three = sampling.exponential_noise((3, 2, 8), seeded(1, 2, 3), "cpu")
    two = sampling.exponential_noise((2, 2, 8), seeded(3, 1), "cpu")
    assert torch.equal(three[[2, 0]], two)
    assert not torch.equal(three[0], three[1])


def test_one_generator_repeats_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second = (sampling.exponential_noise((2, 1, 8), seeded(5)[0], "cpu") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(sampling.uniform((4,), seeded(5)[0], "cpu"), sampling.uniform((4,), seeded(5)[0], "cpu"))
    assert torch.equal(torch.rand(1), expected)


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probabilities.log().expand(1, 20000, 4)
    ids = sampling.choose_tokens(logits, generator=seeded(0)[0])
    shares = torch.bincount(ids.flatten(), minlength=4) / ids.numel()
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)


def test_temperature_zero_is_greedy_and_draws_nothing() -> None:
    logits, generator = torch.randn(2, 3, 5), seeded(0)[0]
    before = generator.get_state()
    assert torch.equal(sampling.choose_tokens(logits, temperature=0.0, generator=generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), before)


def test_filters_keep_the_best() -> None:
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(0).expand(1, 500, 4)
    assert set(sampling.choose_tokens(logits, top_k=2, generator=seeded(0)[0]).unique().tolist()) == {0, 1}
    assert set(sampling.choose_tokens(logits, top_p=0.1, generator=seeded(0)[0]).unique().tolist()) == {0}


def test_invalid_tokens_are_found() -> None:
    checks = sampling.TokenChecks(torch.device("cpu"))
    good = sampling.choose_tokens(torch.randn(2, 1, 4))
    assert torch.equal(checks(good, last=True), good)
    bad = sampling.choose_tokens(torch.tensor([[[1.0, float("nan")]]]))
    with pytest.raises(InvalidOutputError, match="NaN logits"):
        checks(bad, last=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be"),
        ({"guidance_interval": -1}, "guidance_interval must be"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.1}, "top_p must lie"),
        ({"generator": seeded(0, 1, 2)}, "3 generators for 2 images"),
    ],
)
def test_settings_out_of_range_are_named(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "guidance_scale": 1.0,
        "guidance_interval": None,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "generator": None,
        "batch": 2,
    }
    sampling.check_sampling(**good)
    with pytest.raises(InvalidInputError, match=message):
        sampling.check_sampling(**{**good, **wrong})
