"""Attention rows: how much attention every key receives from some query rows, without keeping the attention matrix.

Shape letters: B batch, H query heads, G key heads (H a multiple of G), T query rows, S keys, D channels of a head.

`received[b, j] = sum_i weights[b, i] * mean_h softmax_j(scale * q[b, h, i] . k[b, h, j])`

One row (the class token, the last prompt token), a few rows (the question) and all rows (column means) are the same op
with other weights. Work in flight is a chunk of rows, so memory is O(S) and not O(T S); arithmetic is float32 whatever
the inputs' dtype, because selections flip where half precision makes ties. There is no gradient: selecting tokens has
none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.kernels.dispatch import Op, full_precision_matmul

__all__ = ["attention_received", "reference"]

_LOGITS_AT_ONCE = {"cpu": 1 << 20}  # 4 MiB of float32, to stay in the cache
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 26


def attention_received(
    query: Tensor,
    key: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Weighted mean over query rows, and mean over heads, of the attention that each key receives.

    Args:
        query: the rows that count, `[B, H, T, D]`, rotated already where the model rotates.
        key: all keys, `[B, G, S, D]`; head h reads key head `h // (H / G)`.
        weights: `[B, T]`, default 1/T each: a mean over the rows. Rows of weight 0 do not count.
        scale: factor of the dot products, default `D ** -0.5`.
        rows: int64 `[B, T]`: row i sees keys 0..rows[b, i] only (causal attention). None: all keys.
        valid: bool `[B, S]`: keys that may be seen at all. None: all.

    Returns:
        float32 `[B, S]` (float64 for float64 inputs); each row's weights sum to the sum of `weights[b]`.

    Raises:
        InvalidInputError: for other shapes, dtypes or devices.
    """
    return _OP(query, key, weights, scale=scale, rows=rows, valid=valid)


def _prepare(
    query: Tensor,
    key: Tensor,
    weights: Tensor | None = None,
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple:
    if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise InvalidInputError(
            f"attention_received takes query [B, H, T, D] and key [B, G, S, D], got {tuple(query.shape)} and "
            f"{tuple(key.shape)}"
        )
    batch, heads, count, channels = query.shape
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise InvalidInputError(f"{heads} query heads are no multiple of {key.shape[1]} key heads")
    if not query.is_floating_point() or not key.is_floating_point():
        raise InvalidInputError(f"attention_received takes floating point tensors, got {query.dtype} and {key.dtype}")
    expected = {"weights": (weights, (batch, count)), "rows": (rows, (batch, count))}
    expected["valid"] = (valid, (batch, key.shape[2]))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InvalidInputError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    devices = {tensor.device for tensor in (query, key, weights, rows, valid) if tensor is not None}
    if len(devices) > 1:
        raise InvalidInputError(f"the tensors are on several devices: {', '.join(map(str, devices))}; move them to one")
    dtype = torch.float64 if torch.float64 in (query.dtype, key.dtype) else torch.float32
    if weights is None:
        weights = torch.full((batch, count), 1 / max(count, 1), dtype=dtype, device=query.device)
    return (
        query.detach(),
        key.detach(),
        weights.detach().to(dtype),
        channels**-0.5 if scale is None else float(scale),
        rows,
        valid,
    )


_OP = Op(
    "attention_received",
    "(Tensor query, Tensor key, Tensor weights, float scale, Tensor? rows, Tensor? valid) -> Tensor",
    prepare=_prepare,
    fake=lambda query, key, weights, scale, rows, valid: weights.new_empty(key.shape[0], key.shape[2]),
)


def _visible(rows: Tensor | None, valid: Tensor | None, keys: int, device: torch.device) -> Tensor | None:
    """[B, T or 1, S], True where a row sees a key; None where it sees all."""
    seen = None if rows is None else torch.arange(keys, device=device) <= rows[..., None]
    if valid is None:
        return seen
    return valid[:, None] if seen is None else seen & valid[:, None]


@_OP.backend("reference")
def reference(
    query: Tensor, key: Tensor, weights: Tensor, scale: float, rows: Tensor | None, valid: Tensor | None
) -> Tensor:
    """The specification: the whole attention matrix [B, H, T, S], its mean over heads, the weighted sum of its rows."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query.to(weights.dtype) @ key.to(weights.dtype).transpose(2, 3)) * scale
    seen = _visible(rows, valid, key.shape[2], key.device)
    if seen is not None:
        logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
    return (logits.softmax(dim=-1).mean(dim=1) * weights[..., None]).sum(dim=1)


@_OP.backend("compile")
def _compiled(
    query: Tensor, key: Tensor, weights: Tensor, scale: float, rows: Tensor | None, valid: Tensor | None
) -> Tensor:
    """The specification itself: what there is to fuse in it, the compiler finds."""
    return reference(query, key, weights, scale, rows, valid)


@_OP.backend("eager")
def _eager(
    query: Tensor, key: Tensor, weights: Tensor, scale: float, rows: Tensor | None, valid: Tensor | None
) -> Tensor:
    """Chunks of rows; the heads that share a key head are stacked, so that keys are never repeated."""
    batch, heads, count, channels = query.shape
    groups, keys = key.shape[1], key.shape[2]
    share = heads // groups
    received = weights.new_zeros(batch, keys)
    transposed = key.to(weights.dtype).transpose(2, 3)
    at_once = _LOGITS_AT_ONCE.get(query.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    chunk = max(1, at_once // max(1, batch * heads * keys))
    with full_precision_matmul(query.device):
        for start in range(0, count, chunk):
            part = query[:, :, start : start + chunk].to(weights.dtype) * scale
            size = part.shape[2]
            logits = part.reshape(batch, groups, share * size, channels) @ transposed
            seen = _visible(None if rows is None else rows[:, start : start + chunk], valid, keys, key.device)
            if seen is not None:
                hidden = ~seen.expand(batch, size, keys)
                logits.view(batch, groups, share, size, keys).masked_fill_(
                    hidden[:, None, None], torch.finfo(logits.dtype).min
                )
            row_weights = weights[:, start : start + chunk].repeat(1, share)[:, None, None] / heads
            received += (row_weights @ logits.softmax(dim=-1)).sum(dim=(1, 2))
    return received
