"""Llama-like transformer blocks: RMSNorm, attention with rotary positions, SwiGLU.

Letters: B batch, L positions, K visible positions, D channels, H heads, G key-value heads, C channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.nn.attention import attention
from vistok.nn.cache import LayerCache
from vistok.nn.norms import RMSNorm
from vistok.nn.rope import apply_rotation

__all__ = ["Attention", "FeedForward", "TransformerBlock", "drop_path", "feed_forward_size"]


def feed_forward_size(size: int, multiple_of: int, multiplier: float | None = None) -> int:
    """Hidden width of a SwiGLU layer: 2/3 of 4 D, times the multiplier, rounded up to a multiple."""
    hidden = int(2 * 4 * size / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth: zero the branch of a sample with probability `rate`, scale the others up."""
    if rate == 0.0 or not training:
        return x
    kept = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype, device=x.device).bernoulli_(1.0 - rate)
    return x * kept / (1.0 - rate)


class Attention(nn.Module):
    """Grouped-query self-attention with one projection matrix for queries, keys and values."""

    def __init__(self, size: int, num_heads: int, num_kv_heads: int, dropout: float, residual_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, size // num_heads
        self.dropout, self.residual_dropout = dropout, residual_dropout
        self.wqkv = nn.Linear(size, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(size, size, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor | None, mask: Tensor | None, is_causal: bool, cache: LayerCache | None
    ) -> Tensor:
        """See `TransformerBlock.forward`."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        projected = self.wqkv(x).unflatten(-1, (-1, self.head_dim))
        rotated, value = projected.split([heads + kv_heads, kv_heads], dim=2)
        if rotation is not None:
            rotated = apply_rotation(rotated, rotation)
        query, key = rotated.transpose(1, 2).split([heads, kv_heads], dim=1)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(key, value)
        attended = attention(
            query,
            key,
            value,
            mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            enable_gqa=kv_heads != heads,
        )
        return functional.dropout(self.wo(attended.transpose(1, 2).flatten(2)), self.residual_dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: w2( silu(w1 x) * w3 x )."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w3 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, size, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return functional.dropout(self.w2(functional.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); stochastic depth on both branches."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        num_kv_heads: int,
        ffn_size: int,
        *,
        norm_eps: float,
        attention_dropout: float,
        residual_dropout: float,
        ffn_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attention = Attention(size, num_heads, num_kv_heads, attention_dropout, residual_dropout)
        self.feed_forward = FeedForward(size, ffn_size, ffn_dropout)
        self.attention_norm = RMSNorm(size, norm_eps)
        self.ffn_norm = RMSNorm(size, norm_eps)
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, L, D].
            rotation: complex [L, C / 2] rotary factors of these positions.
            mask: bool, broadcastable to [B, H, L, K]; True where a query may see a key.
            is_causal: causal attention instead of a mask.
            cache: keys and values of earlier positions; those of `x` are appended.
        """
        attended = self.attention(self.attention_norm(x), rotation, mask, is_causal, cache)
        x = x + drop_path(attended, self.drop_path, self.training)
        return x + drop_path(self.feed_forward(self.ffn_norm(x)), self.drop_path, self.training)
