"""Kept tokens drawn on the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.pruners.report import VisualReport

__all__ = ["kept_grid", "overlay"]


def kept_grid(visual: VisualReport, view: int | None = None) -> Tensor:
    """bool [rows, columns]: which tokens of a view stayed.

    Args:
        visual: of `pruner.last_report.stages[...]`.
        view: number of the block (frame, base view, joined tiles); None: the finest that shows the whole picture.

    Raises:
        InvalidInputError: if there is no such view.
    """
    blocks = [block for block in visual.visual.blocks() if block.columns > 1]
    if view is None:
        view = max(range(len(blocks)), key=lambda number: blocks[number].size)
    if not 0 <= view < len(blocks):
        raise InvalidInputError(f"the {visual.kind} has views 0..{len(blocks) - 1}, got {view}")
    block = blocks[view]
    mask = torch.zeros(visual.tokens, dtype=torch.bool)
    mask[visual.kept.cpu()] = True
    grid = mask[block.start : block.start + block.size].view(block.rows, block.columns)
    return grid[:, : block.columns - block.newline]


def overlay(picture: Any, visual: VisualReport, *, view: int | None = None, dim: float = 0.75) -> Any:
    """The picture with dropped tokens darkened.

    The grid is laid over the whole picture; give the picture as the tower saw it (padded or cropped) where the
    processor changes its shape.

    Args:
        picture: a PIL image.
        visual: of `pruner.last_report.stages[...]`.
        view: see `kept_grid`.
        dim: how much darker dropped tokens get, in [0, 1].
    """
    from PIL import Image

    if not 0 <= dim <= 1:
        raise InvalidInputError(f"dim is in [0, 1], got {dim}")
    grid = kept_grid(visual, view)
    mask = Image.fromarray((grid.numpy() * 255).astype("uint8")).resize(picture.size, Image.Resampling.NEAREST)
    picture = picture.convert("RGB")
    dark = Image.blend(picture, Image.new("RGB", picture.size), dim)
    return Image.composite(picture, dark, mask)
