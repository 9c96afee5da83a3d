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
from vistok.kernels.dispatch import Op, check_triton, device_of, full_precision_matmul, triton

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
        int64 `[N]` in 0..K-1; **-1 for a row of `x` that holds NaN or infinity, and for every row if the codebook does.**
        An embedding lookup refuses -1, so a broken encoder cannot pass for a working one.

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
        raise InvalidInputError(f"the codebook is empty: {tuple(codebook.shape)}; it needs at least one code, one channel")
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

    A minimum over short groups is vectorised where an argmin over the row is not (2-3 times faster in all), and both
    steps take the first of equals, so the lowest index still wins.
    """
    dtype = _working_dtype(x, codebook)
    rows, (codes, channels) = x.shape[0], codebook.shape
    group = 1 << (codes.bit_length() // 2)  # about sqrt(K)
    groups = -(-codes // group)
    # The norm rides along as one more channel, against a constant 1; padding codes have an infinite one.
    weight = torch.zeros(channels + 1, groups * group, dtype=dtype, device=x.device)
    weight[:channels, :codes] = codebook.to(dtype).t().neg()
    weight[channels, :codes] = _half_squared_norm(codebook.to(dtype))
    weight[channels, codes:] = math.inf

    at_once = _SCORES_AT_ONCE.get(x.device.type, _SCORES_AT_ONCE_ELSEWHERE)
    chunk = max(1, min(rows, at_once // (groups * group)))
    features = torch.ones(chunk, channels + 1, dtype=dtype, device=x.device)
    scores = torch.empty(chunk, groups * group, dtype=dtype, device=x.device)
    ids = torch.empty(rows, dtype=torch.int64, device=x.device)
    with full_precision_matmul():
        for start in range(0, rows, chunk):
            count = min(chunk, rows - start)
            features[:count, :channels] = x[start : start + count]
            torch.mm(features[:count], weight, out=scores[:count])
            grouped = scores[:count].view(count, groups, group)
            best, best_group = grouped.amin(dim=2).min(dim=1)
            inside = grouped.gather(1, best_group[:, None, None].expand(count, 1, group))[:, 0].argmin(dim=1)
            ids[start : start + count] = (best_group * group + inside).masked_fill_(~best.isfinite(), -1)
    return ids


_UNROLLED_CHANNELS = 32


@_OP.backend("compile")
def _compiled(x: Tensor, codebook: Tensor) -> Tensor:
    """Plain scores `[N, K]`; for few channels written out channel by channel, which the compiler fuses with the argmin."""
    dtype = _working_dtype(x, codebook)
    x, codebook = x.to(dtype), codebook.to(dtype)
    half = codebook.square().sum(dim=1) * 0.5
    if codebook.shape[1] <= _UNROLLED_CHANNELS:
        transposed = codebook.t().contiguous()
        scores = half[None, :]
        for channel in range(codebook.shape[1]):
            scores = scores - x[:, channel, None] * transposed[channel]
    else:
        scores = torch.addmm(half, x, codebook.t(), alpha=-1)
    valid = x.isfinite().all(dim=1) & half.isfinite().all()
    return torch.where(valid, scores.argmin(dim=1), -1)
