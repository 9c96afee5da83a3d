"""Rotary positions on a 2-D grid, as complex factors. Letters: B batch, H heads, L positions, C channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotation", "grid_rotation"]


def grid_rotation(
    grid: tuple[int, int],
    head_dim: int,
    theta: float = 10000.0,
    *,
    num_condition_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Factors of LlamaGen's 2-D rotary positions, raster order, after the condition positions.

    With half = C/2 and f_k = theta^(-2k/half), cell (r, c) has the angles r f_0 .. r f_{half/2-1}, then c f_0 ..
    c f_{half/2-1}. Condition positions have the factor 0, not 1: their queries and keys vanish (this is how the
    published models were trained).

    Args:
        grid: (rows, cols).
        head_dim: C, a multiple of 4.
        theta: base of the frequencies.
        num_condition_tokens: positions before the grid.

    Returns:
        complex64 [num_condition_tokens + rows * cols, C / 2].
    """
    half = head_dim // 2
    frequencies = 1.0 / theta ** (torch.arange(0, half, 2, device=device)[: half // 2].float() / half)
    rows, cols = grid
    across = torch.arange(max(rows, cols), device=device).float()[:, None] * frequencies
    angles = torch.cat(
        [across[:rows, None].expand(rows, cols, -1), across[None, :cols].expand(rows, cols, -1)], dim=-1
    ).flatten(0, 1)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turns.new_zeros(num_condition_tokens, half), turns])


def apply_rotation(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved channel pairs (x_2k, x_2k+1) in float32.

    Args:
        x: [B, L, H, C].
        rotation: complex [L, C / 2].

    Returns:
        [B, L, H, C] in the type of `x`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)
