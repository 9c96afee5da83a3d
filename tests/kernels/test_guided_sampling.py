"""Guided sampling: every backend chooses the token that the specification chooses, for the same noise."""

from __future__ import annotations

import pytest
import torch

from vistok import kernels
from vistok.errors import InvalidInputError


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 50, 100_000])
def test_eager_chooses_the_reference_token(top_k: int, top_p: float) -> None:
    torch.manual_seed(top_k)
    for case, vocabulary in enumerate((1, 7, 300, 1500) * 3):
        logits, uncond = 3 * torch.randn(2, 6, vocabulary)
        if case % 3 == 1:
            logits, uncond = logits.bfloat16(), uncond.bfloat16()
        if case % 3 == 2:  # many equal logits, at the edges of top-k and of the nucleus too
            logits, uncond = logits.round(), uncond.round()
        noise = torch.empty(6, vocabulary).exponential_()
        options = {"uncond_logits": uncond, "guidance_scale": 1.5, "temperature": 0.8, "top_k": top_k, "top_p": top_p}
        with kernels.use("reference"):
            expected = kernels.guided_sampling(logits, noise, **options)
        with kernels.use("eager"):
            assert torch.equal(kernels.guided_sampling(logits, noise, **options), expected)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_tokens_follow_the_probabilities(backend: str) -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = probs.log().expand(20_000, 4)
    with kernels.use(backend):
        free = kernels.guided_sampling(logits, torch.empty(20_000, 4).exponential_())
        filtered = kernels.guided_sampling(logits, torch.empty(20_000, 4).exponential_(), top_k=3, top_p=0.5)
    assert torch.allclose(free.bincount(minlength=4) / 20_000, probs, atol=0.015)
    # of 4:3:2 the best two exceed one half
    expected = torch.tensor([4 / 7, 3 / 7, 0, 0])
    assert torch.allclose(filtered.bincount(minlength=4) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_best_token_without_noise_or_temperature(backend: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    uncond = torch.tensor([[0.0, 2.0, 1.0], [5.0, -3.0, 0.0]])
    with kernels.use(backend):
        assert kernels.guided_sampling(logits, None).tolist() == [1, 0]
        assert kernels.guided_sampling(logits, torch.ones(2, 3), temperature=0).tolist() == [1, 0]
        guided = kernels.guided_sampling(logits, None, uncond_logits=uncond, guidance_scale=3.0)
    assert guided.tolist() == [2, 1]


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("sampled", [False, True])
def test_unusable_rows_give_minus_one(backend: str, sampled: bool) -> None:
    logits = torch.randn(5, 40)
    logits[1, 7], logits[2, 7], logits[3] = float("nan"), float("inf"), -float("inf")
    logits[4, 1:] = -float("inf")
    noise = torch.empty(5, 40).exponential_() if sampled else None
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.5), (5, 0.5)):
        with kernels.use(backend):
            ids = kernels.guided_sampling(logits, noise, top_k=top_k, top_p=top_p)
        assert ids[1:].tolist() == [-1, -1, -1, 0]
        assert ids[0] >= 0


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_draw_of_zero_never_brings_back_a_removed_token(backend: str) -> None:
    with kernels.use(backend):
        ids = kernels.guided_sampling(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.0, 0.0]]), top_k=2)
    assert ids.tolist() == [0]


def test_filter_logits() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.0, 3.0, 0.0]])
    before = logits.clone()
    kept = lambda **options: (kernels.filter_logits(logits, **options) > -1e30).tolist()[0]  # noqa: E731
    assert kept() == [True] * 5
    assert kept(top_k=2) == [False, True, True, True, False]  # both that equal the second stay
    assert kept(top_p=0.0) == [False, True, False, False, False]
    assert kept(top_p=0.95) == [False, True, True, True, False]  # 0.55, 0.76, 0.96: the third crosses the line
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"guidance_scale": 4.0}, "needs uncond_logits"),
        ({"guidance_scale": float("inf"), "uncond_logits": torch.zeros(2, 5)}, "finite"),
        ({"uncond_logits": torch.zeros(2, 6)}, r"uncond_logits is \(2, 6\)"),
    ],
)
def test_bad_settings_are_explained(options: dict, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        kernels.guided_sampling(torch.zeros(2, 5), torch.ones(2, 5), **options)


def test_bad_shapes_are_explained() -> None:
    with pytest.raises(InvalidInputError, match=r"\(2, 1, 5\); take the last position"):
        kernels.guided_sampling(torch.zeros(2, 1, 5), None)
    with pytest.raises(InvalidInputError, match=r"noise is \(2, 4\)"):
        kernels.guided_sampling(torch.zeros(2, 5), torch.ones(2, 4))


def test_it_is_one_node_for_the_compiler() -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(3, 20), torch.empty(3, 20).exponential_()
    compiled = torch.compile(
        lambda a, b: kernels.guided_sampling(a, b, top_k=5, top_p=0.9) + 1, fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(logits, noise), kernels.guided_sampling(logits, noise, top_k=5, top_p=0.9) + 1)
    operator = torch.ops.vistok.guided_sampling.default
    torch.library.opcheck(operator, (logits, noise, None, 1.0, 1.0, 5, 0.9))
    torch.library.opcheck(operator, (logits, None, noise, 2.0, 1.0, 0, 1.0))
