"""The Triton kernel of adaptive normalisation: odd widths, every way to broadcast, outputs poisoned beforehand."""

from __future__ import annotations

import pytest
import torch

from vistok import kernels
from vistok.kernels.adaptive_norm import gated_modulated_norm, modulated_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that an output nobody wrote is seen."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *arguments, **options: empty(*arguments, **options).fill_(float("nan")))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("shape", "modulation", "dtype"),
    [
        ((2, 3, 40), (2, 1, 40), torch.float32),
        ((1, 1, 1), (1, 1, 1), torch.float32),
        ((2, 5, 7), (2, 5, 7), torch.float16),
        ((3, 2, 33), (33,), torch.bfloat16),
        ((2, 3, 20), (1, 1, 1), torch.float32),
    ],
)
def test_adaptive_norm(shape: tuple, modulation: tuple, dtype: torch.dtype, centred: bool) -> None:
    torch.manual_seed(0)
    x, branch = torch.randn(2, *shape).to(DEVICE, dtype)
    gate, scale, shift = torch.randn(3, *modulation).to(DEVICE, dtype)
    found = {}
    for backend in ("reference", "triton"):
        with kernels.use(backend):
            found[backend] = [
                *gated_modulated_norm(x, branch, gate, scale, shift, centred=centred),
                modulated_norm(x, scale, shift, centred=centred),
            ]
    tolerance = max(4e-6, 2 * torch.finfo(dtype).eps)  # one rounding to the inputs' type may go either way
    for ours, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_strided_inputs() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 9, device=DEVICE).transpose(0, 1)
    scale, shift = torch.randn(2, 9, 2, 1, device=DEVICE).permute(0, 2, 3, 1)
    with kernels.use("reference"):
        expected = modulated_norm(x, scale, shift)
    with kernels.use("triton"):
        torch.testing.assert_close(modulated_norm(x, scale, shift), expected, rtol=1e-5, atol=1e-5)


def test_wide_rows_and_float64_are_declined() -> None:
    for x, reason in ((torch.zeros(1, 1, 20000), "at most 16384"), (torch.zeros(1, 1, 4).double(), "float64")):
        with kernels.use("triton"), pytest.raises(kernels.Declined, match=reason):
            modulated_norm(x, x, x)
