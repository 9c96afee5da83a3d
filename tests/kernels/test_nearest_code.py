"""Nearest code: distances against float64 first, then indices."""

from __future__ import annotations

import pytest
import torch

from vistok import kernels
from vistok.errors import InvalidInputError


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "codes", "channels"), [(1, 1, 1), (37, 101, 8), (600, 5000, 8), (50, 333, 257)])
def test_distances_are_the_smallest(backend: str, dtype: torch.dtype, rows: int, codes: int, channels: int) -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(rows, channels, dtype=dtype), torch.randn(codes, channels, dtype=dtype)
    with kernels.use(backend):
        ids = kernels.nearest_code(x, codebook)
    exact = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    found, least = exact.gather(1, ids[:, None])[:, 0], exact.amin(dim=1)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    # A sum of D products errs by at most about D ulp of the largest partial sum.
    bound = (
        4 * channels * torch.finfo(working).eps * (x.double().square().sum(1) + codebook.double().square().sum(1).max())
    )
    assert (found - least <= bound).all()
    clear = exact.topk(min(2, codes), largest=False).values.diff(dim=1).amin() > bound.max() if codes > 1 else True
    if clear:
        assert torch.equal(ids, exact.argmin(dim=1))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_lowest_of_equal_codes_wins(backend: str) -> None:
    torch.manual_seed(0)
    codebook = torch.randn(113, 8).repeat(5, 1)
    with kernels.use(backend):
        assert torch.equal(kernels.nearest_code(codebook[:113], codebook), torch.arange(113))


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_what_is_not_finite_gives_minus_one(backend: str) -> None:
    x, codebook = torch.randn(4, 8), torch.randn(70, 8)
    x[1, 3], x[2, 0] = float("nan"), -float("inf")
    with kernels.use(backend):
        assert (kernels.nearest_code(x, codebook) == -1).tolist() == [False, True, True, False]
        codebook[69, 7] = float("nan")
        assert (kernels.nearest_code(x, codebook) == -1).all()


def test_autocast_and_reduced_matmul_precision_change_nothing() -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(200, 64), torch.randn(3000, 64)
    expected = torch.cdist(x.double(), codebook.double()).argmin(dim=1)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(kernels.nearest_code(x, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_rows_and_no_gradient() -> None:
    assert kernels.nearest_code(torch.randn(0, 4), torch.randn(5, 4)).shape == (0,)
    assert not kernels.nearest_code(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)).requires_grad


@pytest.mark.parametrize(
    ("x", "codebook", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(5, 4), r"x \[N, D\] and codebook \[K, D\], got \(2, 3, 4\)"),
        (torch.zeros(2, 3), torch.zeros(5, 4), r"\(2, 3\) and \(5, 4\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), "codebook is empty"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(5, 3), "floating point"),
        (torch.zeros(2, 3), torch.zeros(5, 3, device="meta"), "cpu and the codebook on meta"),
    ],
)
def test_bad_input_is_explained(x: torch.Tensor, codebook: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        kernels.nearest_code(x, codebook)


def test_it_is_one_node_for_the_compiler() -> None:
    torch.manual_seed(0)
    x, codebook = torch.randn(6, 4), torch.randn(9, 4)
    compiled = torch.compile(lambda a, b: kernels.nearest_code(a, b) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, codebook), kernels.nearest_code(x, codebook) + 1)
    torch.library.opcheck(torch.ops.vistok.nearest_code.default, (x, codebook))
