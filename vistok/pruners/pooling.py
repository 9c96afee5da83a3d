"""Uniform pooling: fewer visual tokens by averaging neighbours, whatever the image shows."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Selection, Span, Stage

__all__ = ["UniformPooling", "pool_grid"]


def pool_grid(features: Tensor, stride: int, mode: Literal["average", "bilinear"] = "average") -> Tensor:
    """[rows, columns, D] -> [ceil(rows / stride), ceil(columns / stride), D].

    Args:
        mode: `"average"` over cells (those at the edge may be smaller), or `"bilinear"` as LLaVA-OneVision pools
            frames.
    """
    maps = features.permute(2, 0, 1)[None].float()
    if mode == "average":
        pooled = functional.avg_pool2d(maps, stride, ceil_mode=True, count_include_pad=False)
    else:
        size = [-(-side // stride) for side in maps.shape[-2:]]
        pooled = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return pooled[0].permute(1, 2, 0).to(features.dtype)


class UniformPooling(Pruner):
    """Pool the grid of every view; of joined tiles, the joined grid. A newline stays for every pooled row.

    Args:
        stride: side of a cell in tokens, at least 2.
        mode: `"average"` or `"bilinear"`.

    Raises:
        InvalidInputError: for another stride or mode.
    """

    def __init__(
        self, stride: int = 2, mode: Literal["average", "bilinear"] = "average", *, positions: Positions = "auto"
    ) -> None:
        if isinstance(stride, bool) or not isinstance(stride, int) or stride < 2:
            raise InvalidInputError(f"stride is an integer from 2 on, got {stride!r}")
        if mode not in ("average", "bilinear"):
            raise InvalidInputError(f"mode is 'average' or 'bilinear', got {mode!r}")
        self.stride, self.mode = stride, mode

        def select(scores: list[Tensor], context: Context) -> list[Tensor]:
            return [self.pooled(context, span).kept for span in context.spans]

        def merge(kept: list[Tensor], scores: list[Tensor], context: Context) -> list[Selection]:
            return [self.pooled(context, span) for span in context.spans]

        super().__init__([Stage("embeddings", select, merger=merge, positions=positions, name="pooling")])

    def pooled(self, context: Context, span: Span) -> Selection:
        """Cells of every block stand where their first token stood."""
        if len(span) != span.visual.tokens:
            raise InvalidInputError("pooling needs whole grids; put no other stage before it")
        features, stride = context.features(span), self.stride
        kept, values = [], []
        for block in span.visual.blocks():
            tokens = features[block.start : block.start + block.size].view(block.rows, block.columns, -1)
            numbers = torch.arange(block.start, block.start + block.size, device=features.device)
            numbers = numbers.view(block.rows, block.columns)
            width = block.columns - block.newline
            if width == 0:
                kept.append(numbers.flatten())
                values.append(tokens.flatten(0, 1))
                continue
            pooled = pool_grid(tokens[:, :width], stride, self.mode)
            places = numbers[::stride, :width:stride]
            if block.newline:
                pooled = torch.cat([pooled, tokens[::stride, -1:]], dim=1)
                places = torch.cat([places, numbers[::stride, -1:]], dim=1)
            kept.append(places.flatten())
            values.append(pooled.flatten(0, 1))
        return Selection(torch.cat(kept), torch.cat(values))
