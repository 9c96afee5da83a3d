"""FastV: after a few decoder layers, keep the visual tokens that the last prompt token attends to.

Liang Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. The score is the attention of the
layer that has just run, mean over heads, in the row of the last prompt token. Rotary positions are kept.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Scorer, Stage, TopK, check_layer, check_ratio, rounded_drop

__all__ = ["FastV", "LastTokenScorer"]


class LastTokenScorer(Scorer):
    """Attention of the last prompt token to each visual token.

    Args:
        layer: the decoder layer before which the stage acts.
        by: `"last"`: the layer before it, which has just run (FastV); `"next"`: the layer itself (PyramidDrop).
    """

    def __init__(self, layer: int, by: Literal["last", "next"]) -> None:
        self.layer, self.by = layer, by

    def watch(self, host: Any, handle: Any, engine: Any) -> None:
        if self.by == "last":
            engine.remember(self.layer - 1)

    def score(self, context: Context) -> list[Tensor]:
        rows, weights = context.engine.last_row(context)
        return context.pick(context.engine.received(context, rows, weights, by=self.by))


class FastV(Pruner):
    """FastV on any supported model.

    Args:
        keep_ratio: share that stays, in (0, 1]; the authors' R is `1 - keep_ratio`.
        layer: prune before this decoder layer (0-based), the authors' K.
        scope: `"per_image"` or `"global"` (all images of a sample share the budget).

    Raises:
        InvalidInputError: for a ratio outside (0, 1] or layer 0 (use `RandomPruner`, which is what the authors do).
    """

    def __init__(
        self,
        keep_ratio: float = 0.5,
        layer: int = 2,
        *,
        scope: Literal["per_image", "global"] = "per_image",
        positions: Positions = "keep",
    ) -> None:
        check_ratio("keep_ratio", keep_ratio)
        check_layer("layer", layer)
        super().__init__(
            [
                Stage(
                    "decoder",
                    TopK(rounded_drop(keep_ratio, of="first"), scope),
                    LastTokenScorer(layer, "last"),
                    layer=layer,
                    positions=positions,
                    name="FastV",
                )
            ]
        )
