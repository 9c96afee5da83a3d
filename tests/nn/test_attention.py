from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from vistok.nn.attention import attention


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 7, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))


@pytest.mark.parametrize("case", ["plain", "causal", "bool", "additive"])
def test_values_are_torchs_own(case: str) -> None:
    query, key, value = inputs()
    mask = None
    if case == "bool":
        mask = torch.ones(7, 7, dtype=torch.bool).tril()
    if case == "additive":
        mask = torch.randn(1, 1, 7, 7)
    ours = attention(query, key, value, mask, is_causal=case == "causal")
    theirs = functional.scaled_dot_product_attention(query, key, value, mask, is_causal=case == "causal")
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(attention(query, key, value, mask, is_causal=case == "causal"), theirs)


def test_training_under_autocast_is_as_exact_as_float32_and_keeps_the_type() -> None:
    query, key, value = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = attention(query, key, value)
    assert ours.dtype == torch.bfloat16
    exact = functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert float((ours.double() - exact).abs().max().detach()) < 2e-2
    ours.float().square().sum().backward()
    mine = query.grad.clone()
    query.grad = None
    exact.square().sum().backward()
    torch.testing.assert_close(mine.double(), query.grad.double(), rtol=0.05, atol=0.05)


def test_half_precision_without_autocast_keeps_its_type() -> None:
    query, key, value = inputs(torch.bfloat16)
    assert attention(query, key, value).dtype == torch.bfloat16
