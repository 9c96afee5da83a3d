"""PyramidDrop: drop visual tokens in three steps over the depth, by the attention of the last prompt token.

Long Xing et al., arXiv 2410.17247. After decoder layers 8, 16 and 24 of 32, by queries and keys of the next layer; the
kept shares are of the original tokens, cut to whole tokens; positions are renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vistok.errors import InvalidInputError
from vistok.pruners.fastv import LastTokenScorer
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Positions, Stage, TopK, check_layer, check_ratio, truncated_keep

__all__ = ["PyramidDrop"]


class PyramidDrop(Pruner):
    """PyramidDrop on any supported model.

    Args:
        layers: prune after so many decoder layers.
        ratios: share of the original tokens kept after each.
        scope: `"per_image"` or `"global"`.

    Raises:
        InvalidInputError: for ratios outside (0, 1], or unequal numbers of layers and ratios.
    """

    def __init__(
        self,
        layers: Sequence[int] = (8, 16, 24),
        ratios: Sequence[float] = (0.5, 0.25, 0.125),
        *,
        scope: Literal["per_image", "global"] = "per_image",
        positions: Positions = "auto",
    ) -> None:
        if len(layers) != len(ratios):
            raise InvalidInputError(f"{len(layers)} layers need as many ratios, got {len(ratios)}")
        stages = []
        for layer, ratio in zip(layers, ratios):
            check_layer("a layer of PyramidDrop", layer)
            count = truncated_keep(check_ratio("a ratio of PyramidDrop", ratio))
            scorer = LastTokenScorer(layer, "next")
            stages.append(
                Stage("decoder", TopK(count, scope), scorer, layer=layer, positions=positions, name="PyramidDrop")
            )
        super().__init__(stages)
