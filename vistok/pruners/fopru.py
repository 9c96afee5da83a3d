"""FoPru: drop visual tokens before the language model by the attention they receive in the vision tower.

Lei Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164. There is no
official code, and the full paper was not available when this was written, so every statement carries a mark: [P] stated
by the paper's abstract or a public summary, [A] our assumption, [X] our extension. **Do not quote results of this class
as FoPru's before someone has compared the assumptions with the paper.**

- [P] Training free, before the language model, in three steps: token significance from the vision encoder's attention,
  pruning by rank or by rows, reordering.
- [A] Significance is the attention that a patch receives in the layer that makes the features the model uses, averaged
  over heads and over all query rows, the class token's included (`queries="all"`). `"patch"` and `"cls"` are the other
  readings; `"cls"` equals FasterVLM's score.
- [P] Rank: all scores ranked. [A] `max(1, int(ratio * N))` stay; of equal scores the lower index.
- [P] Row: whole rows of the grid stay, for local continuity. [A] A row's score is the sum over its tokens, and
  `max(1, int(ratio * rows))` rows stay.
- [P] Kept tokens stay in raster order. [A] Their positions are contiguous.
- [A] Several views (tiles): each is pruned by itself at the same ratio (`scope="per_view"`), since scores compare only
  inside one attention map; `"global"` ranks them together. A newline token stays if its row keeps a patch.
- [X] Towers that merge patches (Qwen2.5-VL, Qwen3-VL, InternVL, SmolVLM): the mean over the patches of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.pruners.hosts.base import Rows, TowerAttention, Visual
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Scorer, Stage, best, check_ratio, truncated_keep

__all__ = ["FoPru", "Newline", "ReceivedScorer", "keep_newlines", "select_rank", "select_rows"]

Newline = Literal["keep_nonempty", "keep_all", "drop"]


def select_rank(significance: Tensor, ratio: float) -> Tensor:
    """int64 [K]: the `max(1, int(ratio * N))` most significant of N tokens, ascending."""
    return best(significance, max(1, int(ratio * significance.shape[0])))


def select_rows(significance: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """int64 [R]: the `max(1, int(ratio * rows))` grid rows of largest sum, ascending."""
    sums = significance.view(-1, grid[1]).sum(dim=1)
    return best(sums, max(1, int(ratio * grid[0])))


class ReceivedScorer(Scorer):
    """Mean attention that each patch receives in one tower layer, packed like the prompt's tokens.

    Args:
        queries: rows of the mean; `"cls"` falls back to `"all"` on towers without a class token if `fallback`.
        fallback: allow that.
    """

    needs_tower = True

    def __init__(self, queries: Rows = "all", fallback: bool = False) -> None:
        if queries not in ("all", "patch", "cls"):
            raise InvalidInputError(f"queries are 'all', 'patch' or 'cls', got {queries!r}")
        self.queries, self.fallback = queries, fallback

    def read_tower(self, attention: TowerAttention) -> Tensor:
        queries = self.queries
        if queries == "cls" and self.fallback and not attention.class_tokens:
            queries = "all"
        return attention.received(queries)

    def score(self, context: Context) -> list[Tensor]:
        return [context.per_token(span, views, 0.0) for span, views in zip(context.spans, context.readings)]


def keep_newlines(visual: Visual, kept: Tensor, newline: Newline) -> Tensor:
    """bool [tokens]: `kept` patches, and the newline tokens that a policy adds."""
    newlines = visual.newlines().to(kept.device)
    if newline == "drop" or not bool(newlines.any()):
        return kept & ~newlines
    if newline == "keep_all":
        return kept | newlines
    rows = newlines.long().cumsum(dim=0) - newlines.long()
    if len(visual.views) > 1:  # the base view comes first and has no rows of its own
        rows[: visual.grid[0] * visual.grid[1]] = int(newlines.sum())
    filled = torch.zeros(int(newlines.sum()) + 1, dtype=torch.long, device=kept.device)
    filled.index_add_(0, rows.clamp_max(len(filled) - 1), (kept & ~newlines).long())
    return kept | (newlines & (filled[rows] > 0))


class ViewSelector:
    """Select inside every view, then carry the choice through tile merge and unpadding.

    Args:
        choose: (scores [N] of a view, its grid) -> kept tokens of the view.
        newline: what becomes of the tokens that end the rows.
    """

    def __init__(self, choose: Callable[[Tensor, tuple[int, int]], Tensor], newline: Newline) -> None:
        if newline not in ("keep_nonempty", "keep_all", "drop"):
            raise InvalidInputError(f"newline is 'keep_nonempty', 'keep_all' or 'drop', got {newline!r}")
        self.choose, self.newline = choose, newline

    def __call__(self, scores: list[Tensor], context: Context) -> list[Tensor]:
        kept = []
        for span, views in zip(context.spans, context.readings):
            visual = span.visual
            masks = []
            for view in views:
                view = view[:, 0] if view.ndim == 2 else view
                mask = torch.zeros(view.shape[0], 1, device=view.device)
                mask[self.choose(view, visual.grid)] = 1.0
                masks.append(mask)
            packed = visual.pack(masks, 0.0)[:, 0]
            if not visual.single:
                if not bool(((packed == 0) | (packed == 1)).all()):
                    visual.sources()  # says that this image was resized
                chosen = keep_newlines(visual, packed > 0.5, self.newline)
            else:
                chosen = packed > 0.5
            kept.append(chosen.nonzero()[:, 0])
        return kept


class GlobalSelector:
    """Rank the packed tokens of all views together; newlines follow their rows."""

    def __init__(self, ratio: float, newline: Newline) -> None:
        self.ratio, self.newline = ratio, newline

    def __call__(self, scores: list[Tensor], context: Context) -> list[Tensor]:
        kept = []
        for score, span in zip(scores, context.spans):
            newlines = span.visual.newlines().to(score.device)
            count = max(1, int(self.ratio * int((~newlines).sum())))
            chosen = torch.zeros(len(span), dtype=torch.bool, device=score.device)
            chosen[best(score.masked_fill(newlines, float("-inf")), count)] = True
            kept.append(keep_newlines(span.visual, chosen, self.newline).nonzero()[:, 0])
        return kept


class FoPru(Pruner):
    """FoPru on any supported model; see the module for what is fact and what assumption.

    Args:
        keep_ratio: share of tokens (rank) or rows (row) that stay, in (0, 1].
        strategy: `"rank"` or `"row"`.
        queries: rows whose attention counts.
        layer: tower layer, negative from the end; None: the one that makes the features the model uses.
        scope: `"per_view"` or `"global"` (rank only).
        newline: `"keep_nonempty"`, `"keep_all"` or `"drop"`.
        positions: `"auto"` closes the gaps where the model has one rotary axis.

    Raises:
        InvalidInputError: for a ratio outside (0, 1] or unknown names.
    """

    def __init__(
        self,
        keep_ratio: float = 0.25,
        strategy: Literal["rank", "row"] = "rank",
        *,
        queries: Rows = "all",
        layer: int | None = None,
        scope: Literal["per_view", "global"] = "per_view",
        newline: Newline = "keep_nonempty",
        positions: Positions = "auto",
    ) -> None:
        self.keep_ratio = ratio = check_ratio("keep_ratio", keep_ratio)
        if strategy not in ("rank", "row"):
            raise InvalidInputError(f"strategy is 'rank' or 'row', got {strategy!r}")
        if scope not in ("per_view", "global") or (scope == "global" and strategy == "row"):
            raise InvalidInputError(f"scope is 'per_view', or 'global' with strategy 'rank'; got {scope!r}")
        self.strategy = strategy

        def rank(view: Tensor, grid: tuple[int, int]) -> Tensor:
            return select_rank(view, ratio)

        def row(view: Tensor, grid: tuple[int, int]) -> Tensor:
            rows = select_rows(view, grid, ratio)
            return (rows[:, None] * grid[1] + torch.arange(grid[1], device=rows.device)).flatten()

        selector = (
            GlobalSelector(ratio, newline)
            if scope == "global"
            else ViewSelector(rank if strategy == "rank" else row, newline)
        )
        count = truncated_keep(ratio, least=1) if strategy == "rank" else None
        scorer = ReceivedScorer(queries)
        super().__init__(
            [Stage("tower", selector, scorer, layer=layer, positions=positions, name="FoPru", count=count)]
        )
