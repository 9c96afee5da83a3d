"""EVA-CLIP's vision transformer, as BLIP-2 and SEED use it: one block short, and without a final norm.

Shape letters: B pictures, S patches and class token, g side of the patch grid, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.nn.vit import ViTBlock

__all__ = ["VisionTransformer", "interpolate_positions"]


class VisionTransformer(nn.Module):
    """EVA's vision transformer: pre-norm blocks, learned positions, no final norm."""

    def __init__(self, image_size: int, patch_size: int, size: int, num_layers: int, num_heads: int, mlp_size: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, size, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, size))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # The authors have no bias for the keys: its third of the joined bias is zero.
        self.blocks = nn.ModuleList(ViTBlock(size, num_heads, mlp_size, norm_eps=1e-6) for _ in range(num_layers))

    def forward(self, pixels: Tensor, states: list[Tensor] | None = None) -> Tensor:
        """[B, 3, H, W] to [B, S, size], class token first; `states` collects the output of every block."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.to(patches).expand(len(patches), -1, -1), patches], dim=1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
            if states is not None:
                states.append(x)
        return x


def interpolate_positions(table: Tensor, positions: int) -> Tensor:
    """A position table [1, 1 + g^2, D] for another square grid: bicubic, the class row is copied.

    Args:
        table: learned positions, class token first.
        positions: wanted number of rows, class token included.
    """
    side, wanted = math.isqrt(table.shape[1] - 1), math.isqrt(positions - 1)
    if side * side != table.shape[1] - 1 or wanted * wanted != positions - 1:
        raise InvalidInputError(
            f"position tables of square grids have g^2 + 1 rows; got {table.shape[1]} and {positions}"
        )
    if side == wanted:
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(grid, (wanted, wanted), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
