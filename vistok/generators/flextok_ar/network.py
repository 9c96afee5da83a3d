"""The blocks of FlexTok's generators: norms, self- and cross-attention, feed-forward, fixed positions.

Letters: R rows, L positions, N tokens, T caption tokens, D channels, H heads, C channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.attention import attention
from vistok.nn.cache import LayerCache
from vistok.nn.norms import RMSNorm

__all__ = [
    "Caption",
    "CrossAttention",
    "FeedForward",
    "Layer",
    "LayerNorm",
    "SelfAttention",
    "make_norm",
    "sincos_positions",
]


class LayerNorm(nn.Module):
    """LayerNorm computed in float32 and cast back."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape [..., D]."""
        normed = functional.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


def make_norm(kind: str, size: int, eps: float) -> nn.Module:
    if kind not in ("layer", "rms"):
        raise InvalidInputError(f"norm_type must be 'layer' or 'rms'; got {kind!r}")
    return LayerNorm(size, eps) if kind == "layer" else RMSNorm(size, eps)


@dataclass(frozen=True)
class Caption:
    """What captions contribute to one layer: keys and values [R, H, T, C], and bool mask [R, 1, 1, T] or None."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def select(self, rows: Tensor) -> Caption:
        """Some of the rows, or some several times."""
        mask = None if self.mask is None else self.mask.index_select(0, rows)
        return Caption(self.keys.index_select(0, rows), self.values.index_select(0, rows), mask)


class SelfAttention(nn.Module):
    """Causal self-attention, one product for queries, keys and values, scale C^-1/2."""

    def __init__(self, size: int, num_heads: int, qk_norm: Callable[[int], nn.Module] | None, bias: bool) -> None:
        super().__init__()
        self.head_dim = size // num_heads
        self.qkv = nn.Linear(size, 3 * size, bias=bias)
        self.proj = nn.Linear(size, size, bias=bias)
        self.q_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim)
        self.k_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim)

    def forward(self, x: Tensor, cache: LayerCache | None) -> Tensor:
        """[R, L, D] -> [R, L, D]; keys and values are appended to the cache."""
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3).unbind(2)
        query, key = self.q_norm(query), self.k_norm(key)
        before = 0
        if cache is not None:
            before = cache.length
            key, value = cache.append(key, value)
        length, mask = x.shape[1], None
        if before and length > 1:
            mask = torch.ones(length, before + length, dtype=torch.bool, device=x.device).tril(before)
        attended = attention(query, key, value, mask, is_causal=not before and length > 1)
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to caption tokens, whose keys and values are computed once a caption."""

    def __init__(self, size: int, num_heads: int, qk_norm: Callable[[int], nn.Module] | None, bias: bool) -> None:
        super().__init__()
        self.head_dim = size // num_heads
        self.q = nn.Linear(size, size, bias=bias)
        self.kv = nn.Linear(size, 2 * size, bias=bias)
        self.proj = nn.Linear(size, size, bias=bias)
        self.q_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim)
        self.k_norm = nn.Identity() if qk_norm is None else qk_norm(self.head_dim)

    def prepare(self, text: Tensor, mask: Tensor | None) -> Caption:
        """Keys and values of embedded captions [R, T, D] with their valid tokens, bool [R, T]."""
        keys, values = self.kv(text).unflatten(-1, (2, -1, self.head_dim)).transpose(1, 3).unbind(2)
        return Caption(self.k_norm(keys), values, None if mask is None else mask[:, None, None])

    def forward(self, x: Tensor, caption: Caption) -> Tensor:
        """[R, L, D] -> [R, L, D]."""
        query = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        attended = attention(query, caption.keys, caption.values, caption.mask)
        return self.proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU with gate and up in one product, or fc2( gelu(fc1 x) )."""

    def __init__(self, size: int, hidden: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(size, 2 * hidden if gated else hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if not self.gated:
            return self.fc2(functional.gelu(self.fc1(x)))
        gate, up = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(functional.silu(gate) * up)


class Layer(nn.Module):
    """x + self-attention, then (with captions) x + cross-attention, then x + feed-forward, each on normed input."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        hidden: int,
        *,
        norm: Callable[[int], nn.Module],
        text: bool,
        qk_norm: bool,
        cross_qk_norm: bool,
        gated_mlp: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(size)
        self.attention = SelfAttention(size, num_heads, norm if qk_norm else None, bias)
        if text:
            self.cross_norm = norm(size)
            self.cross_attention = CrossAttention(size, num_heads, norm if cross_qk_norm else None, bias)
        self.mlp_norm = norm(size)
        self.feed_forward = FeedForward(size, hidden, gated_mlp, bias)

    def forward(self, x: Tensor, caption: Caption | None = None, cache: LayerCache | None = None) -> Tensor:
        """[R, L, D] -> [R, L, D]."""
        x = x + self.attention(self.attention_norm(x), cache)
        if caption is not None:
            x = x + self.cross_attention(self.cross_norm(x), caption)
        return x + self.feed_forward(self.mlp_norm(x))


def sincos_positions(size: int, count: int, kind: str) -> Tensor:
    """Fixed positions [N, D]: the first row, that of the start token, is zero; then come places 0, 1, ...

    `"sincos1d"` counts along a sequence: the half of the channels that would hold the column stays constant.
    `"sincos2d"` counts in raster order over a square.
    """
    side = math.isqrt(count)
    if kind == "sincos2d" and side * side != count:
        raise InvalidInputError(f"sincos2d positions need a square number of tokens; got {count}")
    if size % 4:
        raise InvalidInputError(f"sincos positions need channels divisible by 4; got {size}")
    place = torch.arange(count, dtype=torch.float64)
    column = place % side if kind == "sincos2d" else torch.zeros_like(place)
    row = place // side if kind == "sincos2d" else place
    omega = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size / 4))
    angles = [torch.outer(column, omega), torch.outer(row, omega)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
    return torch.cat([torch.zeros(1, size), table[:-1]])
