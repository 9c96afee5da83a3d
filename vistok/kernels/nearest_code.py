"""Nearest code: which codebook vector is closest to each feature, without keeping the N x K distances.

Shape letters: N features, K codes, D channels.

`argmin_k |x - c_k|^2` needs no `|x|^2` (the same for every k): all fast paths look for the smallest *score*
`|c_k|^2 / 2 - x . c_k`, in float32 whatever the inputs' dtype (float64 stays float64). There is no gradient: quantisers
pass it straight through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.kernels.dispatch import Declined, Op, check_triton, device_of, full_precision_matmul, triton

if triton is not None:
    from triton import language as tl

__all__ = ["nearest_code", "reference"]

_SCORES_AT_ONCE = {"cpu": 1 << 22}  # 16 MiB of float32, to stay in the cache
_SCORES_AT_ONCE_ELSEWHERE = 1 << 26


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook vector nearest to each feature, in Euclidean distance; the lowest index on ties.

    For unit-norm rows on both sides this is the code of largest cosine similarity.

    Args:
        x: features `[N, D]`, floating point.
        codebook: codes `[K, D]`, floating point, on the same device, K >= 1.

    Returns:
        int64 `[N]` in 0..K-1; **-1 for a row of `x` that holds NaN or infinity, and for every row if the codebook
        does.** An embedding lookup refuses -1, so a broken encoder cannot pass for a working one.

    Raises:
        InvalidInputError: for other shapes, dtypes or devices.
        Declined: if a backend was asked for with `vistok.kernels.use` and cannot run this.
    """
    return _OP(x, codebook)


def _prepare(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise InvalidInputError(
            f"nearest_code takes x [N, D] and codebook [K, D], got {tuple(x.shape)} and {tuple(codebook.shape)}; "
            "flatten a feature map to rows of D channels first"
        )
    if codebook.shape[0] == 0 or codebook.shape[1] == 0:
        raise InvalidInputError(
            f"the codebook is empty: {tuple(codebook.shape)}; it needs at least one code and channel"
        )
    if not x.is_floating_point() or not codebook.is_floating_point():
        raise InvalidInputError(f"nearest_code takes floating point tensors, got {x.dtype} and {codebook.dtype}")
    if x.device != codebook.device:
        raise InvalidInputError(f"x is on {x.device} and the codebook on {codebook.device}; move one of them")
    return x.detach(), codebook.detach()


_OP = Op(
    "nearest_code",
    "(Tensor x, Tensor codebook) -> Tensor",
    prepare=_prepare,
    fake=lambda x, codebook: x.new_empty(x.shape[0], dtype=torch.int64),
)


def _working_dtype(x: Tensor, codebook: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, codebook.dtype) else torch.float32


@_OP.backend("reference")
def reference(x: Tensor, codebook: Tensor) -> Tensor:
    """The specification: every distance `[N, K]`, as a sum of squared differences."""
    dtype = _working_dtype(x, codebook)
    x, codebook = x.to(dtype), codebook.to(dtype)
    distances = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    valid = x.isfinite().all(dim=1) & codebook.isfinite().all()
    return torch.where(valid, distances.argmin(dim=1), -1)


def _half_squared_norm(codebook: Tensor) -> Tensor:
    """`|c|^2 / 2` `[K]`, NaN for codes that are not finite: NaN wins every minimum below, and so marks the row."""
    half = codebook.square().sum(dim=1).mul_(0.5)
    return half.masked_fill_(~half.isfinite(), math.nan)


@_OP.backend("eager")
def _eager(x: Tensor, codebook: Tensor) -> Tensor:
    """One matmul a chunk of rows; then the minimum of each group of codes, the best group, and the best code in it.

    A minimum over short groups is vectorised where an argmin over the row is not (2-4 times faster in all for few
    channels), and both steps take the first of equals, so the lowest index still wins.
    """
    dtype = _working_dtype(x, codebook)
    codebook = codebook.to(dtype)
    half = _half_squared_norm(codebook)
    rows, codes = x.shape[0], codebook.shape[0]
    group = 1 << (codes.bit_length() // 2)  # about sqrt(K)
    groups = -(-codes // group)
    at_once = _SCORES_AT_ONCE.get(x.device.type, _SCORES_AT_ONCE_ELSEWHERE)
    chunk = max(1, min(rows, at_once // (groups * group)))
    scores = torch.full((chunk, groups * group), math.inf, dtype=dtype, device=x.device)  # padding codes never win
    ids = torch.empty(rows, dtype=torch.int64, device=x.device)
    with full_precision_matmul(x.device):
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            features = x[start : start + count].to(dtype)
            torch.addmm(half, features, codebook.t(), alpha=-1, out=scores[:count, :codes])
            grouped = scores[:count].view(count, groups, group)
            best, best_group = grouped.amin(dim=2).min(dim=1)
            inside = grouped.gather(1, best_group[:, None, None].expand(count, 1, group))[:, 0].argmin(dim=1)
            ids[start : start + count] = (best_group * group + inside).masked_fill_(~best.isfinite(), -1)
    return ids


_UNROLLED_CHANNELS = 32


def _check_few_channels(x: Tensor, codebook: Tensor) -> None:
    if codebook.shape[1] > _UNROLLED_CHANNELS:
        raise Declined(
            f"the codes have {codebook.shape[1]} channels, and above {_UNROLLED_CHANNELS} the op is one large matmul, "
            "which compiling does not improve"
        )


@_OP.backend("compile", check=_check_few_channels)
def _compiled(x: Tensor, codebook: Tensor) -> Tensor:
    """Scores `[N, K]` written out channel by channel: the compiler fuses that with the argmin and keeps no matrix."""
    dtype = _working_dtype(x, codebook)
    x, codebook = x.to(dtype), codebook.to(dtype)
    half = codebook.square().sum(dim=1) * 0.5
    transposed = codebook.t().contiguous()
    scores = half[None, :]
    for channel in range(codebook.shape[1]):
        scores = scores - x[:, channel, None] * transposed[channel]
    valid = x.isfinite().all(dim=1) & half.isfinite().all()
    return torch.where(valid, scores.argmin(dim=1), -1)


# -------------------------------------------------------------------------------------------------------------- Triton

if triton is not None:

    @triton.jit
    def _nearest_code_kernel(
        x,
        codebook,
        half,
        ids,
        rows,
        codes,
        channels,
        x_row_stride,
        codebook_row_stride,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ONE_SLICE: tl.constexpr,
    ):
        """BLOCK_N features a program; codes stream by, and the best score and index so far stay in registers."""
        row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_D)
        row_inside = row < rows
        x_rows = x + row[:, None] * x_row_stride
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        best_id = tl.zeros([BLOCK_N], tl.int64)
        if ONE_SLICE:
            mask = row_inside[:, None] & (column < channels)[None, :]
            x_slice = tl.load(x_rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        for start in range(0, codes, BLOCK_K):
            code = start + tl.arange(0, BLOCK_K)
            code_inside = code < codes
            code_rows = codebook + code.to(tl.int64)[None, :] * codebook_row_stride
            dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            if ONE_SLICE:
                c_mask = (column < channels)[:, None] & code_inside[None, :]
                c_slice = tl.load(code_rows + column[:, None], mask=c_mask, other=0.0).to(tl.float32)
                dots = tl.dot(x_slice, c_slice, dots, input_precision="ieee")  # TF32 would flip indices
            else:
                for first in range(0, channels, BLOCK_D):
                    inside = first + column < channels
                    x_mask = row_inside[:, None] & inside[None, :]
                    c_mask = inside[:, None] & code_inside[None, :]
                    x_part = tl.load(x_rows + (first + column)[None, :], mask=x_mask, other=0.0).to(tl.float32)
                    c_part = tl.load(code_rows + (first + column)[:, None], mask=c_mask, other=0.0).to(tl.float32)
                    dots = tl.dot(x_part, c_part, dots, input_precision="ieee")
            scores = tl.load(half + code, mask=code_inside, other=float("inf"))[None, :] - dots
            scores = tl.where(scores != scores, float("-inf"), scores)  # a minimum drops NaN: let it win and be seen
            block_best, block_id = tl.min(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
            closer = block_best < best  # strictly: the lower index wins
            best = tl.where(closer, block_best, best)
            best_id = tl.where(closer, start + block_id.to(tl.int64), best_id)
        finite = (best > float("-inf")) & (best < float("inf"))
        tl.store(ids + row, tl.where(finite, best_id, -1), mask=row_inside)


def _launch_settings(rows: int, channels: int) -> dict[str, int]:
    """Blocks that leave the accumulator in registers; the width a power of 2 and at least 16, as `tl.dot` asks."""
    if channels <= 32:
        width = max(16, 1 << (channels - 1).bit_length())
        # Few features: small blocks, so that all multiprocessors have some.
        return {"BLOCK_N": 64 if rows >= 8192 else 16, "BLOCK_K": 128, "BLOCK_D": width, "num_warps": 4}
    return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_D": 32, "num_warps": 8}


@_OP.backend("triton", check=check_triton)
def _triton(x: Tensor, codebook: Tensor) -> Tensor:
    ids = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    if x.shape[0] == 0:
        return ids
    x = x if x.stride(1) == 1 else x.contiguous()
    codebook = codebook if codebook.stride(1) == 1 else codebook.contiguous()
    half = _half_squared_norm(codebook.float())
    settings = _launch_settings(*x.shape)
    with device_of(x):
        _nearest_code_kernel[(triton.cdiv(x.shape[0], settings["BLOCK_N"]),)](
            x,
            codebook,
            half,
            ids,
            x.shape[0],
            codebook.shape[0],
            x.shape[1],
            x.stride(0),
            codebook.stride(0),
            ONE_SLICE=x.shape[1] <= settings["BLOCK_D"],
            **settings,
        )
    return ids
