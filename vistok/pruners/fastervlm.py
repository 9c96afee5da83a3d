"""FasterVLM: keep the patches that the class token attends to.

Qizhe Zhang et al., arXiv 2412.01818 (version 2 is called VisPruner). The attention row of the tower's class token in
the layer that makes the features, mean over heads; a fixed number of patches of every view stays. On LLaVA-NeXT the
authors join tiles without newlines and without unpadding; here padding is cut as the model does it, and newlines are
dropped.
"""

from __future__ import annotations

from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.pruners.fopru import ReceivedScorer, ViewSelector
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Positions, Stage, best, check_ratio, truncated_keep

__all__ = ["FasterVLM"]


class FasterVLM(Pruner):
    """Rank patches by the class token's attention.

    Args:
        keep_ratio: share of each view's tokens that stays, in (0, 1].
        tokens_per_view: their number instead.
        layer: tower layer; None: the one that makes the features the model uses.
        fallback: on towers without a class token, use the mean over all tokens' rows instead of refusing. Reports
            elsewhere found such scores worse than random on towers with pixel shuffle: compare with `RandomPruner`.

    Raises:
        InvalidInputError: for a ratio outside (0, 1] or no positive number.
    """

    def __init__(
        self,
        keep_ratio: float = 0.25,
        *,
        tokens_per_view: int | None = None,
        layer: int | None = None,
        fallback: bool = True,
        positions: Positions = "auto",
    ) -> None:
        check_ratio("keep_ratio", keep_ratio)
        if tokens_per_view is not None and tokens_per_view < 1:
            raise InvalidInputError(f"tokens_per_view is a positive number, got {tokens_per_view}")

        def choose(view: Tensor, grid: tuple[int, int]) -> Tensor:
            if tokens_per_view is not None and tokens_per_view > view.shape[0]:
                raise InvalidInputError(f"a view has {view.shape[0]} tokens, and tokens_per_view is {tokens_per_view}")
            return best(view, tokens_per_view or max(1, int(view.shape[0] * keep_ratio)))

        scorer = ReceivedScorer("cls", fallback=fallback)
        count = None if tokens_per_view is not None else truncated_keep(keep_ratio, least=1)
        selector = ViewSelector(choose, "drop")
        super().__init__(
            [Stage("tower", selector, scorer, layer=layer, positions=positions, name="FasterVLM", count=count)]
        )
