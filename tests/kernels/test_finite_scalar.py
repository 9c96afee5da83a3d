"""Finite scalar quantisation: against float64, round trips, saturation, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from vistok import kernels
from vistok.errors import InvalidInputError
from vistok.kernels.finite_scalar import bound

LEVELS = [(8, 8, 8, 5, 5, 5), (5, 4, 3), (2, 3), (1000, 999, 70)]


def exact_ids(z: torch.Tensor, levels: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids by the definition in float64, and how far each row is from the nearest rounding boundary."""
    ids = torch.zeros(len(z), dtype=torch.int64)
    margin = torch.full((len(z),), math.inf, dtype=torch.float64)
    step = 1
    for channel, level in enumerate(levels):
        half = (level - 1) * 1.001 / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        squashed = torch.tanh(z[:, channel].double() + math.atanh(offset / half)) * half - offset
        margin = torch.minimum(margin, ((squashed - squashed.floor()) - 0.5).abs())
        ids += (squashed.round().long() + level // 2) * step
        step *= level
    return ids, margin


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ids_against_float64(backend: str, levels: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    z = (2 * torch.randn(3000, len(levels))).to(dtype)
    with kernels.use(backend):
        ids = kernels.finite_scalar(z, levels)
    expected, margin = exact_ids(z, levels)
    clear = margin > 1e-6 * max(levels)
    assert clear.float().mean() > 0.9
    assert torch.equal(ids[clear], expected[clear])
    assert 0 <= int(ids.min()) <= int(ids.max()) < math.prod(levels)


@pytest.mark.parametrize("levels", LEVELS[:3])
def test_codes_and_ids_are_inverse(levels: tuple[int, ...]) -> None:
    every = torch.arange(math.prod(levels))
    codes = kernels.finite_scalar_codes(every, levels)
    assert len(torch.unique(codes, dim=0)) == len(every)
    half = torch.tensor(levels) // 2
    for channel, level in enumerate(levels):
        assert float(codes[:, channel].min()) == -1.0
        assert float(codes[:, channel].max()) == pytest.approx(1.0 if level % 2 else 1 - 2 / level)
    # What lies at the middle of a cell is quantised to that cell.
    offset = torch.tensor([0.5 if level % 2 == 0 else 0.0 for level in levels], dtype=torch.float64)
    width = (torch.tensor(levels, dtype=torch.float64) - 1) * 1.001 / 2
    z = torch.atanh((codes.double() * half + offset) / width) - torch.atanh(offset / width)
    for backend in ("reference", "eager"):
        with kernels.use(backend):
            assert torch.equal(kernels.finite_scalar(z.float(), levels), every)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_saturation_and_nan(backend: str) -> None:
    z = torch.zeros(5, 3)
    z[0], z[1], z[2, 1], z[3] = 50.0, -50.0, math.nan, math.inf
    with kernels.use(backend):
        assert kernels.finite_scalar(z, (5, 4, 3)).tolist() == [59, 0, -1, 59, 2 + 2 * 5 + 1 * 20]


def test_training_and_inference_agree_and_gradients_pass_through() -> None:
    torch.manual_seed(0)
    levels = (8, 5)
    z = torch.randn(2, 50, 2, requires_grad=True)
    codes, ids = kernels.finite_scalar_quantize(z, levels)
    assert torch.equal(ids, kernels.finite_scalar(z.flatten(0, 1), levels).view(2, 50))
    torch.testing.assert_close(codes, kernels.finite_scalar_codes(ids, levels))
    weight = torch.randn_like(codes)
    (codes * weight).sum().backward()
    smooth = z.detach().requires_grad_(True)
    ((bound(smooth, levels) / (torch.tensor(levels) // 2)) * weight).sum().backward()
    torch.testing.assert_close(z.grad, smooth.grad)


def test_unrounded_vectors_keep_their_values() -> None:
    torch.manual_seed(0)
    z, levels = torch.randn(4, 6, 2), (8, 5)
    kept = torch.tensor([True, False, False, True])[:, None]
    codes, ids = kernels.finite_scalar_quantize(z, levels, kept)
    rounded, whole = kernels.finite_scalar_quantize(z, levels)
    assert torch.equal(codes[1:3], rounded[1:3])
    assert torch.equal(ids[1:3], whole[1:3])
    torch.testing.assert_close(codes[0], bound(z[0], levels) / torch.tensor([4, 2]))


@pytest.mark.parametrize(
    ("z", "levels", "message"),
    [
        (torch.zeros(2, 3, 2), (8, 5), r"z \[N, 2\]"),
        (torch.zeros(2, 3), (8, 5), r"\(2, 3\)"),
        (torch.zeros(2, 2, dtype=torch.int64), (8, 5), "floating point"),
        (torch.zeros(2, 2), (8, 1), "at least 2"),
        (torch.zeros(2, 0), (), "at least one number"),
        (torch.zeros(2, 6), (4096,) * 6, "2\\^53"),
    ],
)
def test_bad_input_is_explained(z: torch.Tensor, levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        kernels.finite_scalar(z, levels)


def test_it_is_one_node_for_the_compiler() -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 3)
    compiled = torch.compile(lambda a: kernels.finite_scalar(a, (5, 4, 3)) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), kernels.finite_scalar(z, (5, 4, 3)) + 1)
    torch.library.opcheck(torch.ops.vistok.finite_scalar.default, (z, [5, 4, 3]))
    assert kernels.finite_scalar(torch.zeros(0, 3), (5, 4, 3)).shape == (0,)
