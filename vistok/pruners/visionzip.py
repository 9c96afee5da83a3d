"""VisionZip: keep the tokens the class token attends to, and merge the rest into a few contextual ones.

Senqiao Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467.
Dominant tokens (the class token is one of them) come first in raster order, then the contextual ones. The merged
features pass through the model's projector. Differences: tiles follow one another in the order of the views instead
of being put back into a grid. Towers without a class token use the attention received from all tokens; where patches
are merged before the projector, contextual tokens are means of projected tokens (our extension).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.pruners.hosts.base import TowerAttention
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Positions, Scorer, Selection, Span, Stage

__all__ = ["VisionZip", "contextual_tokens"]


def contextual_tokens(rest: Tensor, metric: Tensor, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge tokens into evenly spaced targets.

    Every token of `rest` that is no target goes to the target of most similar metric; a contextual token is its
    target's feature plus the mean of those assigned to it (the authors' sum of the two).

    Args:
        rest: int64 [R], the tokens that are left, ascending.
        metric: [N, d] keys, normalised here.
        features: [N, D].
        count: number of contextual tokens, at most R.

    Returns:
        targets int64 [count], and their features [count, D].
    """
    step = max(1, len(rest) // count)
    place = torch.arange(0, len(rest), step, device=rest.device)[:count]
    chosen = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    chosen[place] = True
    targets, others = rest[chosen], rest[~chosen]
    unit = functional.normalize(metric.float(), dim=-1)
    nearest = (unit[others] @ unit[targets].T).argmax(dim=1)
    sums = torch.zeros(len(targets), features.shape[-1], dtype=torch.float32, device=features.device)
    sums.index_add_(0, nearest, features[others].float())
    number = torch.zeros(len(targets), device=features.device).index_add_(0, nearest, sums.new_ones(len(others)))
    means = sums / number.clamp_min(1)[:, None]
    return targets, (features[targets].float() + means).to(features.dtype)


class _Scorer(Scorer):
    """Attention and mean key of every patch."""

    needs_tower = True
    needs_features = True

    def read_tower(self, attention: TowerAttention) -> Tensor:
        score = attention.received("cls" if attention.class_tokens else "all")
        metric = attention.key.float().mean(dim=1)[:, attention.class_tokens :]
        return torch.cat([score[..., None], metric], dim=-1)

    def score(self, context: Context) -> list[Tensor]:
        return [
            context.per_token(span, [view[:, 0] for view in views], 0.0)
            for span, views in zip(context.spans, context.readings)
        ]


class VisionZip(Pruner):
    """VisionZip on any supported model.

    Args:
        dominant: dominant tokens of every view, the class token counted (paper: 54, 108, 162 for 64, 128, 192).
        contextual: contextual tokens of every view (10, 20, 30).
        layer: tower layer; None: the one that makes the features the model uses.

    Raises:
        InvalidInputError: for numbers below 1, or more tokens than a view has (when it is met).
    """

    def __init__(
        self, dominant: int = 54, contextual: int = 10, *, layer: int | None = None, positions: Positions = "auto"
    ) -> None:
        for name, value in {"dominant": dominant, "contextual": contextual}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"{name} is a number of tokens from 1 on, got {value!r}")
        self.dominant, self.contextual = dominant, contextual

        def select(scores: list[Tensor], context: Context) -> list[Tensor]:
            return [span.index for span in context.spans]

        def merge(kept: list[Tensor], scores: list[Tensor], context: Context) -> list[Selection]:
            return [self.zipped(context, span, views) for span, views in zip(context.spans, context.readings)]

        def count(now: int, first: int) -> int:  # of one view
            return min(now, dominant + contextual)

        scorer = _Scorer()
        super().__init__(
            [Stage("tower", select, scorer, merge, layer=layer, positions=positions, name="VisionZip", count=count)]
        )

    def zipped(self, context: Context, span: Span, views: list[Tensor]) -> Selection:
        """All views of one visual."""
        host: Any = context.engine.host
        hidden = context.engine.tower_features(span, context.number)
        values, tokens = [], []
        for number, view in enumerate(views):
            size = view.shape[0]
            if self.dominant + self.contextual > size:
                raise InvalidInputError(
                    f"a view has {size} tokens, and VisionZip is to keep {self.dominant} + {self.contextual}"
                )
            score, metric = view[:, 0], view[:, 1:]
            prefix = 0 if hidden is None else hidden.shape[1] - size
            projected = host.project(hidden[number, :1]) if hidden is not None and prefix in (0, 1) else None
            has_class = projected is not None and prefix == 1
            best = score.topk(self.dominant - has_class).indices
            mask = torch.zeros(size, dtype=torch.bool, device=score.device)
            mask[best] = True
            dominant, rest = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
            if projected is not None:
                assert hidden is not None
                features = hidden[number, prefix:]
                targets, merged = contextual_tokens(rest, metric, features, self.contextual)
                first = [hidden[number, :1]] if has_class else []
                values.append(host.project(torch.cat([*first, features[dominant], merged])))
                stands = [rest[:1]] if has_class else []
                tokens.append(torch.cat([*stands, dominant, targets]) + number * size)
            else:
                features = context.features(span)[number * size : (number + 1) * size]
                targets, merged = contextual_tokens(rest, metric, features, self.contextual)
                chosen = torch.cat([dominant, targets])
                order = chosen.argsort()
                values.append(torch.cat([features[dominant], (merged / 2).to(features.dtype)])[order])
                tokens.append(chosen[order] + number * size)
        joined, stand = torch.cat(values), torch.cat(tokens)
        if len(joined) > len(span):
            raise InvalidInputError(
                f"the {span.visual.kind} fills {len(span)} places of the prompt, and VisionZip makes "
                f"{len(joined)} tokens"
            )
        if span.visual.single and bool((stand.diff() > 0).all()):
            return Selection(stand, joined)
        # The order of the tokens is the authors', so the places only have to be as many.
        return Selection(torch.arange(len(joined), device=joined.device), joined, stand.to(joined.device))
