"""Adaptive normalisation: against float64, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok import kernels
from vistok.errors import InvalidInputError
from vistok.kernels.adaptive_norm import gated_modulated_norm, modulated_norm, reference

MODULATIONS = {"row": (3, 1, 12), "token": (3, 5, 12), "shared": (1, 1, 12), "channels": (12,), "scalar": (1, 1, 1)}


def inputs(kind: str = "row", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 3, 5, 12, generator=generator)
    gate, scale, shift = torch.randn(3, *MODULATIONS[kind], generator=generator)
    return [part.to(dtype) for part in (x + 2.0, branch, gate, scale, shift)]


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", list(MODULATIONS))
def test_both_ops_against_float64(kind: str, dtype: torch.dtype, centred: bool, backend: str) -> None:
    given = inputs(kind, dtype)
    exact_total, exact = reference(*[part.double() for part in given], 1e-6, centred)
    nothing = torch.zeros(1, dtype=torch.float64)
    doubles = [part.double() for part in given]
    _, exact_alone = reference(doubles[0], nothing, nothing, *doubles[3:], 1e-6, centred)
    with kernels.use(backend):
        total, normed = gated_modulated_norm(*given, centred=centred)
        alone = modulated_norm(given[0], *given[3:], centred=centred)
    # Sums of D terms in float32, then one rounding to the inputs' type.
    tolerance = 24 * torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps + torch.finfo(dtype).eps
    for ours, expected in ((total, exact_total), (normed, exact), (alone, exact_alone)):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["row", "token", "channels"])
def test_gradients(kind: str, centred: bool) -> None:
    small = (slice(2), slice(2), slice(3))  # every element is moved twice
    given = [part[small[3 - part.ndim :]].clone().requires_grad_() for part in inputs(kind, torch.float64)]
    assert torch.autograd.gradcheck(lambda *parts: gated_modulated_norm(*parts, centred=centred), given)
    assert torch.autograd.gradcheck(
        lambda x, scale, shift: modulated_norm(x, scale, shift, centred=centred), [given[0], *given[3:]]
    )


def test_gradients_of_the_norm_alone() -> None:
    """The residual stream may go unused."""
    given = [part.requires_grad_() for part in inputs()]
    gated_modulated_norm(*given)[1].sum().backward()
    ours = [part.grad.clone() for part in given]
    for part in given:
        part.grad = None
    reference(*given, 1e-6, False)[1].sum().backward()
    for found, part in zip(ours, given, strict=True):
        torch.testing.assert_close(found, part.grad, rtol=1e-4, atol=1e-5)


def test_strided_inputs_and_no_rows() -> None:
    x, branch, gate, scale, shift = inputs()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    for ours, expected in zip(
        gated_modulated_norm(turned, branch, gate, scale, shift), gated_modulated_norm(x, branch, gate, scale, shift)
    ):
        assert torch.equal(ours, expected)
    assert modulated_norm(x[:0], scale[:1], shift[:1]).shape == (0, 5, 12)


def test_it_is_one_node_for_the_compiler() -> None:
    given = inputs()
    compiled = torch.compile(lambda *parts: gated_modulated_norm(*parts)[1] + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), gated_modulated_norm(*given)[1] + 1)
    torch.library.opcheck(torch.ops.vistok.gated_modulated_norm.default, (*given, 1e-6, False))
    torch.library.opcheck(torch.ops.vistok.modulated_norm.default, (given[0], *given[3:], 1e-6, True))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(3, 12), r"x must be \[R, T, D\]"),
        (0, torch.zeros(3, 5, 12, dtype=torch.int64), "x must be floating point"),
        (1, torch.zeros(3, 1, 12), "branch .* it must be like x"),
        (1, torch.zeros(3, 5, 12, dtype=torch.bfloat16), "branch .* it must be like x"),
        (2, torch.zeros(2, 1, 12), "gate .* must broadcast to x"),
        (3, torch.zeros(3, 5, 11), "scale .* must broadcast to x"),
        (4, torch.zeros(1, 1, 12, device="meta"), "x is on cpu and shift on meta"),
    ],
)
def test_bad_input_is_explained(position: int, value: Tensor, message: str) -> None:
    given = inputs()
    given[position] = value
    with pytest.raises(InvalidInputError, match=message):
        gated_modulated_norm(*given)
