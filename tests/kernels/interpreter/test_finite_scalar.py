"""The Triton kernel of finite scalar quantisation, interpreted on a CPU or on a GPU, with poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter.test_triton import DEVICE, both, poisoned
from vistok import kernels

__all__ = ["poisoned"]  # the fixture


@pytest.mark.parametrize(
    ("rows", "levels", "dtype"),
    [
        (1, (2,), torch.float32),
        (37, (8, 8, 8, 5, 5, 5), torch.float32),
        (300, (5, 4, 3), torch.float16),
        (65, (1000, 999, 70), torch.float32),
    ],
)
def test_finite_scalar(rows: int, levels: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = torch.randn(rows, len(levels)).to(DEVICE, dtype)
    ids, expected = both(kernels.finite_scalar, z, levels)
    assert torch.equal(ids, expected)


def test_strides_saturation_and_nan() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 40, device=DEVICE).t()
    z[0], z[1], z[2, 1], z[3] = 50.0, -50.0, float("nan"), float("inf")
    ids, expected = both(kernels.finite_scalar, z, (5, 4, 3))
    assert torch.equal(ids, expected)
    assert ids[:4].tolist() == [59, 0, -1, 59]
    assert both(kernels.finite_scalar, z[:0], (5, 4, 3))[0].shape == (0,)
