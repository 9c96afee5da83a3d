"""Vision transformer blocks, with timm's parameter names.

Letters: B batch, L positions, Q positions whose output is wanted, D channels, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import attention

__all__ = ["BlockScales", "SelfAttention", "ViTBlock", "ViTMLP"]


class BlockScales(NamedTuple):
    """What multiplies the input and the output of a block's two branches, each [D]; no shift.

    Attributes:
        attention_in, mlp_in: the norm's output is multiplied by 1 + this.
        attention_out, mlp_out: the branch's output is multiplied by this.
    """

    attention_in: Tensor
    attention_out: Tensor
    mlp_in: Tensor
    mlp_out: Tensor


class SelfAttention(nn.Module):
    """Self-attention without a mask; one matrix for queries, keys and values."""

    def __init__(
        self,
        size: int,
        num_heads: int,
        dropout: float = 0.0,
        projection_dropout: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout, self.projection_dropout = num_heads, dropout, projection_dropout
        self.qkv = nn.Linear(size, 3 * size, bias=qkv_bias)
        self.proj = nn.Linear(size, size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [B, Q, D], keys and values [B, L, D] to the projected outputs [B, Q, D]."""
        query, key, value = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = attention(query, key, value, dropout_p=dropout)
        return functional.dropout(
            self.proj(attended.transpose(1, 2).flatten(2)), self.projection_dropout, self.training
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.attend(*self.qkv(x).chunk(3, dim=-1))

    def last(self, x: Tensor, wanted: int) -> Tensor:
        """Outputs [B, Q, D] of the last `wanted` positions alone: keys and values of all, the rest for these."""
        size = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query_bias, other_bias = (None, None) if bias is None else (bias[:size], bias[size:])
        query = functional.linear(x[:, -wanted:], weight[:size], query_bias)
        key, value = functional.linear(x, weight[size:], other_bias).chunk(2, dim=-1)
        return self.attend(query, key, value)


class ViTMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, size: int, hidden: int, dropout: float = 0.0, approximate: str = "none") -> None:
        super().__init__()
        self.dropout, self.approximate = dropout, approximate
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x = functional.dropout(functional.gelu(self.fc1(x), approximate=self.approximate), self.dropout, self.training)
        return functional.dropout(self.fc2(x), self.dropout, self.training)


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attention has no mask, so the order of the positions is free: those whose output is wanted come last.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        mlp_size: int,
        *,
        norm_eps: float,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size, eps=norm_eps)
        self.attn = SelfAttention(size, num_heads, attention_dropout, projection_dropout, qkv_bias)
        self.norm2 = nn.LayerNorm(size, eps=norm_eps)
        self.mlp = ViTMLP(size, mlp_size, projection_dropout)

    def project(self, x: Tensor, scales: BlockScales | None = None) -> Tensor:
        """Queries, keys and values [B, L, 3 D] of inputs [B, L, D]; each position's depend on it alone."""
        return self.attn.qkv(_normed(x, self.norm1, None if scales is None else scales.attention_in))

    def forward(
        self, x: Tensor, qkv: Tensor | None = None, wanted: int | None = None, scales: BlockScales | None = None
    ) -> Tensor:
        """One block.

        Args:
            x: [B, L, D].
            qkv: what `project` gives for `x`, if it is known.
            wanted: return the last so many positions only; None is all.
            scales: multiply the branches (in the norm's weights, which costs nothing, and in the residual sum).

        Returns:
            [B, Q, D].
        """
        wanted = x.shape[1] if wanted is None else wanted
        if qkv is not None or wanted == x.shape[1]:
            query, key, value = (self.project(x, scales) if qkv is None else qkv).chunk(3, dim=-1)
            branch = self.attn.attend(query[:, -wanted:], key, value)
        else:
            branch = self.attn.last(_normed(x, self.norm1, None if scales is None else scales.attention_in), wanted)
        x = x[:, -wanted:]
        x = x + branch if scales is None else torch.addcmul(x, branch, scales.attention_out)
        branch = self.mlp(_normed(x, self.norm2, None if scales is None else scales.mlp_in))
        return x + branch if scales is None else torch.addcmul(x, branch, scales.mlp_out)


def _normed(x: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
    if scale is None:
        return norm(x)
    factor = 1.0 + scale
    return functional.layer_norm(x, norm.normalized_shape, norm.weight * factor, norm.bias * factor, norm.eps)
