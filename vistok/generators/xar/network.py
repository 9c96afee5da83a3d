"""xAR's transformer block: RMSNorm, modulation by class and time, rotary attention, gated MLP.

`Block.forward` adds in the order of the authors' code and serves training, where gradients of long sums show every
rounding. Sampling (`EntityRun`) runs the same modules in fused pieces, which reach over the border of two blocks.

Letters: R rows, G groups of tokens with one condition each, T tokens of a group, N tokens of the sequence, D width,
H heads, C channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.kernels import gated_modulated_norm, modulated_norm
from vistok.nn.rope import apply_rotation

__all__ = [
    "NORM_EPS",
    "Attend",
    "Block",
    "Modulation",
    "PackedFeedForward",
    "attend_to_prefixes",
    "axial_rotation",
    "norm_step",
    "residual_step",
    "rotate",
    "split_modulation",
]

NORM_EPS = 1e-6

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What the caller wants of queries, keys and values [R, H, N, C]."""
Modulation: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Gates of attention and MLP, scales (with the 1 that they are added to), shifts; each broadcasts to [R, G, T, D]."""


def axial_rotation(coordinates: Tensor, head_dim: int, device: torch.device, theta: float = 10000.0) -> Tensor:
    """Rotary factors complex64 [N, C / 2]: the first half of the channels turns with the row, the second with the
    column; rates theta^(-2j / (C / 2)), j = 0..C/4-1. Positions may lie between tokens.

    Args:
        coordinates: [N, 2], row and column.
        head_dim: C, a multiple of 4.
        device: of the result.
        theta: base of the rates.
    """
    half = head_dim // 2
    rates = 1.0 / theta ** (torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half)
    positions = coordinates.float()
    angles = torch.cat([positions[:, :1] * rates, positions[:, 1:] * rates], dim=1)
    return torch.complex(angles.cos(), angles.sin()).to(device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`apply_rotation` in real arithmetic, whose rounding is the authors': x cos + (the pair turned by 90 degrees) sin.

    Args:
        x: [R, N, H, C].
        rotation: complex [N, C / 2].
    """
    cosines, sines = (part.repeat_interleave(2, dim=-1)[:, None] for part in (rotation.real, rotation.imag))
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return (x * cosines + turned * sines).to(x.dtype)


def rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) with statistics in float32."""
    return functional.rms_norm(x.float(), (x.shape[-1],), None, NORM_EPS).to(x.dtype)


def norm_step(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """rms(x) * scale + shift, in sampling."""
    if x.is_cuda:
        return modulated_norm(x, scale, shift, eps=NORM_EPS)
    return torch.addcmul(shift, rms(x), scale)


def residual_step(x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and its `norm_step`, in sampling; one kernel on GPUs."""
    if x.is_cuda:
        return gated_modulated_norm(x, branch, gate, scale, shift, eps=NORM_EPS)
    x = torch.addcmul(x, gate, branch)
    return x, norm_step(x, scale, shift)


def attend_to_prefixes(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], dropout: float) -> Tensor:
    """Attention [R, H, N, C] of a sequence of entities, each to itself and all earlier ones, one call an entity.

    Args:
        query, key, value: [R, H, N, C].
        starts: position at which each entity starts, and N at the end.
        dropout: of the attention probabilities.
    """
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], dropout_p=dropout
        )
        for start, stop in pairwise(starts)
    ]
    return torch.cat(parts, dim=2)


def split_modulation(values: Tensor) -> Modulation:
    """[..., 6, D] apart."""
    first, second, third, fourth, fifth, sixth = values.unbind(-2)
    return first, second, third, fourth, fifth, sixth


class Attention(nn.Module):
    """Self-attention with 2-D rotary positions."""

    def __init__(self, size: int, num_heads: int, projection_dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.projection_dropout = num_heads, size // num_heads, projection_dropout
        self.qkv = nn.Linear(size, 3 * size)
        self.proj = nn.Linear(size, size)

    def project(self, x: Tensor, rotation: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """[R, N, D] -> turned queries and keys, and values, each [R, H, N, C].

        `exact` rounds as the authors' code in float32; in half precision nothing would be left of that.
        """
        heads = self.num_heads
        projected = self.qkv(x).unflatten(-1, (3 * heads, -1))
        exact = exact and projected.dtype == torch.float32
        turned = (rotate if exact else apply_rotation)(projected[:, :, : 2 * heads], rotation).transpose(1, 2)
        return turned[:, :heads], turned[:, heads:], projected[:, :, 2 * heads :].transpose(1, 2)

    def merge(self, attended: Tensor) -> Tensor:
        """[R, H, N, C] -> [R, N, D]."""
        return functional.dropout(
            self.proj(attended.transpose(1, 2).flatten(2)), self.projection_dropout, self.training
        )


class FeedForward(nn.Module):
    """fc2( GELU(fc1_g x) * fc1_x x ), a GEGLU."""

    def __init__(self, size: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1_g = nn.Linear(size, hidden)
        self.fc1_x = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = functional.gelu(self.fc1_g(x)) * self.fc1_x(x)
        hidden = functional.dropout(hidden, self.dropout, self.training)
        return functional.dropout(self.fc2(hidden), self.dropout, self.training)


class PackedFeedForward:
    """`FeedForward` for sampling: one product for both halves; on GPUs, widths rounded up with zeros.

    Half-precision kernels want multiples of 8 (2730 and 3413, the widths of xAR-L and H, are none); GELU(0) * 0 is 0,
    so the padding changes nothing. The matrices are copies: a third of the weights again.
    """

    def __init__(self, module: FeedForward, multiple: int = 64) -> None:
        missing = -module.fc2.in_features % multiple

        def padded(value: Tensor, dim: int) -> Tensor:
            return functional.pad(value.detach(), (*[0, 0] * (value.ndim - 1 - dim), 0, missing))

        self.weight = torch.cat([padded(module.fc1_g.weight, 0), padded(module.fc1_x.weight, 0)])
        self.bias = torch.cat([padded(module.fc1_g.bias, 0), padded(module.fc1_x.bias, 0)])
        self.output, self.output_bias = padded(module.fc2.weight, 1), module.fc2.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        gate, value = functional.linear(x, self.weight, self.bias).chunk(2, dim=-1)
        return functional.linear(functional.gelu(gate) * value, self.output, self.output_bias)


class Block(nn.Module):
    """x + g1 attention(norm(x) s1 + b1), then x + g2 mlp(norm(x) s2 + b2); all six come from the condition."""

    def __init__(
        self, size: int, num_heads: int, hidden: int, *, attention_dropout: float, projection_dropout: float
    ) -> None:
        super().__init__()
        self.attention_dropout = attention_dropout
        self.attn = Attention(size, num_heads, projection_dropout)
        self.mlp = FeedForward(size, hidden, projection_dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def modulation(self, activated: Tensor) -> Tensor:
        """SiLU(condition) [..., D] -> [..., 6, D]: gates, scales (with the 1 that they are added to) and shifts, of
        attention and MLP each.
        """
        values = self.ada_lin[1](activated).unflatten(-1, (6, -1))
        gates, scales, shifts = values.split(2, dim=-2)
        return torch.cat([gates, 1 + scales, shifts], dim=-2)

    def forward(self, x: Tensor, activated: Tensor, spread: Tensor | None, rotation: Tensor, attend: Attend) -> Tensor:
        """The block in training.

        Args:
            x: [R, G, T, D].
            activated: SiLU(condition) [R, G', D].
            spread: int64 [T], which of the G' each token has (then G is 1); None if G' is G.
            rotation: complex [G T, C / 2].
            attend: attention of all G T tokens.
        """
        values = self.modulation(activated)
        values = values[:, :, None] if spread is None else values.index_select(1, spread)[:, None]
        gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp = split_modulation(values)
        normed = (rms(x) * scale_attention + shift_attention).flatten(1, 2)
        attended = self.attn.merge(attend(*self.attn.project(normed, rotation, exact=True)))
        x = x + gate_attention * attended.view_as(x)
        return x + gate_mlp * self.mlp(rms(x) * scale_mlp + shift_mlp)
