"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): each channel is bounded and rounded to a few levels.

Shape letters: N vectors, C channels, K = product of the levels: the codebook, which exists only implicitly.

A channel with L levels is squashed to `tanh(z + shift) * (L - 1) * 1.001 / 2 - offset` and rounded half to even, to
integers from -(L // 2) on; `offset` is 1/2 for an even L, so that its levels lie at integers, too. Digits in 0..L-1 are
the integers plus L // 2, and the id is the number that they write, the first channel being the lowest digit. Everything
is computed in float32 (float64 stays), because bfloat16 cannot tell more than 256 ids apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.kernels.dispatch import Op, check_triton, device_of, triton

if triton is not None:
    from triton import language as tl

__all__ = ["bound", "finite_scalar", "finite_scalar_codes", "finite_scalar_quantize", "reference"]

_EXACT_IN_FLOAT32 = 1 << 24


def finite_scalar(z: Tensor, levels: Sequence[int]) -> Tensor:
    """The id of each vector. There is no gradient; training uses `finite_scalar_quantize`.

    Args:
        z: `[N, C]`, floating point, before the squashing.
        levels: of each of the C channels, at least 2.

    Returns:
        int64 `[N]` in 0..K-1; **-1 for a row that holds NaN** (infinities saturate).

    Raises:
        InvalidInputError: for other shapes or types, or impossible levels.
        Declined: if a backend was asked for with `vistok.kernels.use` and cannot run this.
    """
    return _OP(z, levels)


def finite_scalar_codes(ids: Tensor, levels: Sequence[int]) -> Tensor:
    """Code vectors of ids, the inverse of `finite_scalar`.

    Args:
        ids: int64, any shape [...], in 0..K-1 (what lies outside wraps around: check before).
        levels: of each channel.

    Returns:
        float32 [..., C]: even levels span [-1, 1 - 2 / L], odd ones [-1, 1].
    """
    sizes = torch.tensor(_checked_levels(levels), device=ids.device)
    digits = ids[..., None] // torch.tensor(_basis(levels), device=ids.device) % sizes
    half = sizes // 2
    return (digits - half).float() / half


def bound(z: Tensor, levels: Sequence[int]) -> Tensor:
    """The squashed values [..., C] that rounding turns into integers, in float32 (float64 stays)."""
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    shift, half, offset = (
        torch.tensor(part, dtype=dtype, device=z.device) for part in zip(*map(_constants, _checked_levels(levels)))
    )
    return torch.tanh(z.to(dtype) + shift) * half - offset


def finite_scalar_quantize(z: Tensor, levels: Sequence[int], unrounded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes with a straight-through gradient, and ids, for training.

    Args:
        z: [..., C], before the squashing.
        levels: of each channel.
        unrounded: bool, broadcastable to [...]: vectors that keep their squashed values (dropout of the quantiser);
            their ids are truncated.

    Returns:
        codes float32 [..., C], whose gradient is that of the squashed values, and ids int64 [...].
    """
    squashed = bound(z, levels)
    values = squashed + (squashed.round() - squashed).detach()
    if unrounded is not None:
        values = torch.where(unrounded[..., None], squashed, values)
    half = torch.tensor(levels, device=z.device) // 2
    codes = values / half
    digits = codes.detach() * half + half
    if unrounded is None:
        digits = digits.round()
    ids = (digits * torch.tensor(_basis(levels), dtype=digits.dtype, device=z.device)).sum(-1).long()
    return codes, ids


def _basis(levels: Sequence[int]) -> list[int]:
    """What a step in each channel adds to the id: 1, L1, L1 L2, ..."""
    return [1, *accumulate(levels[:-1], mul)]


def _constants(levels: int) -> tuple[float, float, float]:
    """(shift, half, offset) of a channel."""
    half = (levels - 1) * 1.001 / 2
    offset = 0.5 if levels % 2 == 0 else 0.0
    return math.atanh(offset / half), half, offset


def _checked_levels(levels: Sequence[int]) -> list[int]:
    checked = [int(level) for level in levels]
    if not checked or min(checked) < 2:
        raise InvalidInputError(f"levels must be at least one number, each at least 2; got {list(levels)}")
    if math.prod(checked) >= 2**53:
        raise InvalidInputError(f"the levels {checked} make more than 2^53 codes, which no id can count")
    return checked


def _prepare(z: Tensor, levels: Sequence[int]) -> tuple[Tensor, list[int]]:
    checked = _checked_levels(levels)
    if z.ndim != 2 or z.shape[1] != len(checked):
        raise InvalidInputError(
            f"finite_scalar takes z [N, {len(checked)}] for the levels {checked}, got {tuple(z.shape)}; "
            "flatten a sequence to rows first"
        )
    if not z.is_floating_point():
        raise InvalidInputError(f"finite_scalar takes a floating point tensor, got {z.dtype}")
    return z.detach(), checked


_OP = Op(
    "finite_scalar",
    "(Tensor z, int[] levels) -> Tensor",
    prepare=_prepare,
    fake=lambda z, levels: z.new_empty(z.shape[0], dtype=torch.int64),
)


@_OP.backend("reference")
def reference(z: Tensor, levels: list[int]) -> Tensor:
    """The specification."""
    digits = bound(z, levels).round() + torch.tensor(levels, device=z.device) // 2
    ids = (digits.double() * torch.tensor(_basis(levels), dtype=torch.float64, device=z.device)).sum(1)
    return torch.where(z.isnan().any(1), -1.0, ids).long()


@_OP.backend("compile")
def _compiled(z: Tensor, levels: list[int]) -> Tensor:
    """The specification itself: one chain of elementwise work, which the compiler fuses."""
    return reference(z, levels)


@_OP.backend("eager")
def _eager(z: Tensor, levels: list[int]) -> Tensor:
    """Channel by channel: constants are plain numbers, and every pass runs over long contiguous rows."""
    exact = math.prod(levels) < _EXACT_IN_FLOAT32 and z.dtype != torch.float64
    ids = torch.zeros(z.shape[0], dtype=torch.float32 if exact else torch.float64, device=z.device)
    columns = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32).t().contiguous()
    for column, level, step in zip(columns, levels, _basis(levels)):
        shift, half, offset = _constants(level)
        digit = column.add_(shift).tanh_().mul_(half).sub_(offset).round_().add_(level // 2)
        ids.add_(digit if exact else digit.double(), alpha=step)
    return ids.nan_to_num_(nan=-1.0).long()


# -------------------------------------------------------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _finite_scalar_kernel(
        z, table, ids, rows, row_stride, channel_stride, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
    ):
        """BLOCK rows a program; `table` holds shift, half, offset, L // 2 and L of each channel."""
        row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = row < rows
        total = tl.zeros([BLOCK], tl.int64)
        broken = tl.zeros([BLOCK], tl.int1)
        step = tl.full([], 1, tl.int64)
        for channel in tl.static_range(CHANNELS):
            value = tl.load(z + row * row_stride + channel * channel_stride, mask=inside, other=0.0).to(tl.float32)
            broken = broken | (value != value)
            shift = tl.load(table + channel * 5)
            half = tl.load(table + channel * 5 + 1)
            offset = tl.load(table + channel * 5 + 2)
            middle = tl.load(table + channel * 5 + 3)
            level = tl.load(table + channel * 5 + 4)
            # tanh, written so that large arguments of either sign saturate.
            shifted = value + shift
            squashed = (2.0 * tl.sigmoid(2.0 * shifted) - 1.0) * half - offset
            # Adding and subtracting 1.5 * 2^23 rounds half to even.
            digit = (squashed + 12582912.0) - 12582912.0 + middle
            total += tl.where(broken, 0.0, digit).to(tl.int64) * step
            step = step * level.to(tl.int64)
        tl.store(ids + row, tl.where(broken, -1, total), mask=inside)


@_OP.backend("triton", check=check_triton)
def _triton(z: Tensor, levels: list[int]) -> Tensor:
    ids = torch.empty(z.shape[0], dtype=torch.int64, device=z.device)
    if z.shape[0] == 0:
        return ids
    rows = [[*_constants(level), float(level // 2), float(level)] for level in levels]
    table = torch.tensor(rows, dtype=torch.float32).to(z.device, non_blocking=True)
    block = 256
    with device_of(z):
        _finite_scalar_kernel[(triton.cdiv(z.shape[0], block),)](
            z, table, ids, z.shape[0], z.stride(0), z.stride(1), CHANNELS=len(levels), BLOCK=block, num_warps=4
        )
    return ids
