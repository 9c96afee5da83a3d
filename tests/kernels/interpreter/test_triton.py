"""The Triton kernels, interpreted on a CPU or on a GPU: tiny, non-power-of-2 shapes, outputs poisoned beforehand."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from vistok import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLING = importlib.import_module("vistok.kernels.guided_sampling")
NEAREST = importlib.import_module("vistok.kernels.nearest_code")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds an impossible token, so that an output nobody wrote is seen."""
    empty = torch.empty

    def poison(*arguments, **options):
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poison)


def both(function, *arguments, **options):
    with kernels.use("reference"):
        expected = function(*arguments, **options)
    with kernels.use("triton"):
        return function(*arguments, **options), expected


@pytest.mark.parametrize(
    ("rows", "codes", "channels", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (5, 7, 3, torch.float16),
        (19, 300, 8, torch.float32),
        (67, 65, 40, torch.float32),
    ],
)
def test_nearest_code(rows: int, codes: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(rows, channels).to(DEVICE, dtype), torch.randn(codes, channels).to(DEVICE, dtype)
    assert torch.equal(*both(kernels.nearest_code, x, codebook))


def test_nearest_code_strides_ties_and_nonfinite_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 12, device=DEVICE).t()  # [12, 8] without unit inner stride
    codebook = torch.randn(70, 8, device=DEVICE).repeat(2, 1)
    ids, expected = both(kernels.nearest_code, x, codebook)
    assert torch.equal(ids, expected)
    assert ids.max() < 70
    x[3, 2], x[5, 0] = float("nan"), float("inf")
    ids, expected = both(kernels.nearest_code, x, codebook)
    assert torch.equal(ids, expected)
    assert (ids == -1).nonzero()[:, 0].tolist() == [3, 5]
    codebook[69, 1] = float("nan")
    assert (both(kernels.nearest_code, x, codebook)[0] == -1).all()


@pytest.mark.parametrize(
    ("dtype", "rounded", "top_k", "top_p"),
    [
        (torch.float32, False, 0, 1.0),
        (torch.bfloat16, False, 5, 1.0),
        (torch.float32, True, 9, 0.7),  # many equal logits, at the edges of top-k and of the nucleus too
        (torch.float32, True, 0, 0.3),
        (torch.float32, False, 1000, 0.0),
    ],
)
def test_guided_sampling(
    dtype: torch.dtype, rounded: bool, top_k: int, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SAMPLING, "_launch_settings", lambda vocabulary: {"BLOCK": 64, "num_warps": 4})
    torch.manual_seed(top_k)
    logits, uncond = (2 * torch.randn(2, 1, 70)).to(DEVICE, dtype)
    if rounded:
        logits, uncond = logits.round(), uncond.round()
    noise = torch.zeros(1, 70).exponential_().to(DEVICE)
    options = {"uncond_logits": uncond, "guidance_scale": 2.0, "temperature": 0.9, "top_k": top_k, "top_p": top_p}
    assert torch.equal(*both(kernels.guided_sampling, logits, noise, **options))


def test_guided_sampling_greedy_and_unusable_rows() -> None:
    torch.manual_seed(0)
    logits, noise = torch.randn(5, 37, device=DEVICE), torch.zeros(5, 37).exponential_().to(DEVICE)
    logits[1, 4], logits[2, 4], logits[3] = float("nan"), float("inf"), -float("inf")
    logits[4, 3:9] = 9.0
    for draws in (noise, None):
        ids, expected = both(kernels.guided_sampling, logits, draws, top_p=0.8)
        assert torch.equal(ids, expected)
        assert ids[1:4].tolist() == [-1, -1, -1]
    assert ids[4] == 3


def test_the_environment_variable_chooses() -> None:
    assert kernels.current() == os.environ.get("VISTOK_KERNELS", "auto")


def test_triton_declines_float64() -> None:
    with kernels.use("triton"), pytest.raises(kernels.Declined, match="float64"):
        kernels.nearest_code(torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
