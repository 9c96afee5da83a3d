"""The small autoregressive model that LARP is trained with, so that its tokens become easy to predict. Training only.

Letters: B videos, N tokens, C code dimension, D channels of the prior.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vistok.errors import InvalidInputError
from vistok.nn.vit import ViTMLP

__all__ = ["ContinuousPrior"]


class CausalAttention(nn.Module):
    """Causal self-attention; one matrix for queries, keys and values."""

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return F.dropout(self.proj(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)


class PriorBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.ln1 = nn.LayerNorm(size)
        self.attn = CausalAttention(size, num_heads, dropout)
        self.ln2 = nn.LayerNorm(size)
        self.mlp = ViTMLP(size, 4 * size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.ln1(x))
        return x + F.dropout(self.mlp(self.ln2(x)), self.dropout, self.training)


class ContinuousPrior(nn.Module):
    """A GPT whose inputs and outputs are code vectors; likeness to the codes gives the logits.

    Args:
        codebook_dim: C.
        size: D.
        num_layers: blocks.
        num_heads: attention heads.
        max_tokens: longest sequence.
        dropout: of embeddings, attention and branches, in training only.
        l2_normalize: predict unit vectors.
    """

    def __init__(
        self,
        codebook_dim: int,
        size: int,
        num_layers: int,
        num_heads: int,
        max_tokens: int,
        dropout: float,
        l2_normalize: bool,
    ) -> None:
        super().__init__()
        if size % num_heads:
            raise InvalidInputError(f"the prior's width {size} must be a multiple of its heads {num_heads}")
        self.dropout, self.l2_normalize = dropout, l2_normalize
        self.input_proj = nn.Linear(codebook_dim, size)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, max_tokens, size))
        self.blocks = nn.ModuleList(PriorBlock(size, num_heads, dropout) for _ in range(num_layers))
        self.ln_f = nn.LayerNorm(size)
        self.head = nn.Linear(size, codebook_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(cast(Tensor, module.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Code vectors [B, N, C] to what is predicted to follow each of them, [B, N, C]."""
        x = self.input_proj(x) + self.pos_emb[:, : x.shape[1]]
        x = F.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        predicted = self.head(self.ln_f(x))
        return F.normalize(predicted, dim=-1) if self.l2_normalize else predicted
