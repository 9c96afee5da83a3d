"""VFlowOpt: calibrated importance from the vision tower, recycling, and a schedule of three stages that is searched.

"VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", ICCV 2025, arXiv
2508.05211. Written from the equations.

1. *Importance* (section 3.1). In one attention map of the tower, tokens that receive more than `threshold` times the
   mean are global; a token's importance is the mean attention that the global tokens pay to it, plus `entropy_weight`
   times the softmax over a view of the entropy of its pixels. Newline tokens have importance 1.
2. *Recycling* (3.2). Of those to be dropped, all in one `cell_size` x `cell_size` cell become one token: their mean
   weighted by importance, at the place of the most important one.
3. *Stages* (3.3). Before the language model, and before two decoder layers by the same importance.
4. *Search* (3.4). `vistok.pruners.vflowopt_search` looks for the settings that keep the last token's final state.

Differences from the released code: attention is causal in every layer (there, one layer loses its mask under SDPA);
entropy is taken of pixels in 0..255 and not of normalised ones; an empty global set falls back to all tokens instead of
NaN; several images, batches and any supported model work.

Shape letters: V views, N tokens of a view, P patches, n tokens of a visual.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.kernels.attention_rows import attention_received
from vistok.pruners.hosts.base import Block, TowerAttention
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import (
    Context,
    Positions,
    Scorer,
    Selection,
    Span,
    Stage,
    TopK,
    best,
    check_layer,
    check_ratio,
    rounded_drop,
)

__all__ = [
    "PUBLISHED",
    "Settings",
    "VFlowOpt",
    "average_kept",
    "global_attention",
    "last_ratio",
    "patch_entropy",
    "recycle",
]


@dataclass(frozen=True)
class Settings:
    """What the search looks for.

    Attributes:
        ratios: share kept before the language model, and of what is left before each of the two layers.
        threshold: multiple of the mean attention above which a token is global (t).
        cell_size: side of a recycling cell in tokens (a); need not be whole.
        entropy_weight: weight of the entropy term (alpha).
    """

    ratios: tuple[float, ...]
    threshold: float
    cell_size: float
    entropy_weight: float = 0.0


PUBLISHED = {
    0.5: Settings((0.7233201448753168, 0.748747637472693, 0.487), 28.683047941520474, 11.756787150848968),
    0.25: Settings(
        (0.2651026358526424, 0.9833433139039235, 0.8773258179532721), 34.759552803070484, 15.580797034937687
    ),
    0.1: Settings((0.11661529508161146, 1.0, 0.6011), 39.26492840997221, 17.386981849158786),
}
"""The authors' settings for LLaVA-OneVision-7B by average share kept; layers 9 and 18 of 28."""


# ---------------------------------------------------------------------------------------------------------- the maths


def global_attention(attention: TowerAttention, threshold: float) -> Tensor:
    """float32 [V, P]: mean attention that each patch receives from the global tokens (paper equations 2 to 4).

    Two passes over rows, and only the few global rows in the second: no map [P, P] is held.
    """
    skip = attention.class_tokens
    received = attention.received("all")
    everything = received if not skip else _all_received(attention)
    chosen = everything > threshold * everything.mean(dim=1, keepdim=True)
    counts = chosen.sum(dim=1)
    most = int(counts.max())
    if int(counts.min()) == 0:
        warnings.warn(
            f"no token receives {threshold} times the mean attention in some view; its importance is the attention "
            "received from all tokens. A smaller threshold avoids this",
            stacklevel=2,
        )
    if most == 0:
        return received
    order = torch.argsort(chosen.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    weights = chosen.gather(1, order).float()
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1)
    heads, channels = attention.query.shape[1], attention.query.shape[3]
    rows = attention.query.gather(2, order[:, None, :, None].expand(-1, heads, -1, channels))
    paid = attention_received(rows, attention.key, weights, scale=attention.scale, valid=attention.valid)[:, skip:]
    return torch.where(counts[:, None] > 0, paid, received)


def _all_received(attention: TowerAttention) -> Tensor:
    """Attention received by all tokens, the class token included: it may be global, too."""
    return attention_received(attention.query, attention.key, None, scale=attention.scale, valid=attention.valid)


def patch_entropy(pixels: Tensor, patch_size: int) -> Tensor:
    """float32 [B, H / patch, W / patch], in bits: entropy of the grey values of every patch.

    Args:
        pixels: [B, 3, H, W] in [0, 1]; cut to whole levels 0..255. Values outside are clamped.
    """
    levels = (pixels.float() * 255).clamp(0, 255).to(torch.uint8).float()
    grey = (0.3333 * levels.sum(dim=1)).round().clamp(0, 255).long()
    batch, height, width = grey.shape
    rows, columns = height // patch_size, width // patch_size
    cells = grey[:, : rows * patch_size, : columns * patch_size]
    cells = cells.view(batch, rows, patch_size, columns, patch_size).permute(0, 1, 3, 2, 4).flatten(3)
    counts = torch.zeros(batch, rows, columns, 256, device=grey.device)
    counts.scatter_add_(3, cells, torch.ones_like(cells, dtype=torch.float32))
    share = counts / patch_size**2
    return -(share * (share + 1e-10).log2()).sum(dim=-1)


def last_ratio(target: float, first: float, second: float, layers: Sequence[int] = (9, 9, 10)) -> float:
    """The third ratio that meets an average share kept over the depth (paper section 3.4); negative if none can.

    Args:
        target: average share of tokens over all layers.
        first, second: the first two ratios.
        layers: number of layers that see each stage's tokens.
    """
    one, two, three = layers
    return min(1.0, (sum(layers) * target - one * first - two * first * second) / three / (first * second))


def average_kept(ratios: Sequence[float], layers: Sequence[int]) -> float:
    """Share of tokens that a layer sees on average."""
    share, total = 1.0, 0.0
    for ratio, count in zip(ratios, layers):
        share *= ratio
        total += share * count
    return total / sum(layers)


def cells_of(indices: Tensor, blocks: Sequence[Block], cell_size: float) -> Tensor:
    """int64 [m]: number of the cell of each token, in raster order, blocks one after the other."""
    cells = torch.zeros_like(indices)
    start = 0
    for block in blocks:
        inside = (indices >= block.start) & (indices < block.start + block.size)
        place = indices - block.start
        row = torch.div(place, block.columns, rounding_mode="floor").double() / cell_size
        column = (place % block.columns).double() / cell_size
        across = int((block.columns - 1) / cell_size) + 1
        number = row.floor().long() * across + column.floor().long() + start
        cells = torch.where(inside, number, cells)
        start += (int((block.rows - 1) / cell_size) + 1) * across
    return cells


def recycle(
    features: Tensor, importance: Tensor, blocks: Sequence[Block], ratio: float, cell_size: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Drop the least important tokens, and bring each cell of them back as one (paper section 3.2).

    Args:
        features: projected tokens [n, D].
        importance: [n].
        blocks: how the tokens lie.
        ratio: share to keep.
        cell_size: side of a cell in tokens.

    Returns:
        kept int64 [K] ascending; their features [K, D]; `low` int64, the tokens that were gathered in cells, least
        important first; and the cell int64 of each of these.
    """
    count = importance.shape[0]
    dropped = round(count * (1 - ratio))
    low = torch.sort(importance, stable=True).indices[: min(count, dropped + int(count / cell_size**2))]
    keep = torch.ones(count, dtype=torch.bool, device=features.device)
    keep[low] = False
    if not len(low):
        return keep.nonzero()[:, 0], features, low, low
    cells = cells_of(low, blocks, cell_size)
    _, cell = cells.unique(return_inverse=True)
    total = int(cell.max()) + 1
    weight = importance[low].float()
    mass = weight.new_zeros(total).index_add_(0, cell, weight)
    share = (weight / mass[cell])[:, None]
    merged = torch.zeros(total, features.shape[-1], device=features.device)
    merged.index_add_(0, cell, features[low].float() * share)
    most = weight.new_full((total,), float("-inf")).scatter_reduce_(0, cell, weight, "amax")
    # Of equal tokens the first in order of importance represents the cell.
    order = torch.arange(len(low), device=low.device)
    first = torch.where(weight == most[cell], order, len(low))
    chosen = torch.full((total,), len(low), device=low.device).scatter_reduce_(0, cell, first, "amin")
    represent = low[chosen]
    keep[represent] = True
    features = features.clone()
    features[represent] = merged.to(features.dtype)
    kept = keep.nonzero()[:, 0]
    return kept, features[kept], low, cell


# -------------------------------------------------------------------------------------------------------- the pruner


class ImportanceScorer(Scorer):
    """Importance of every token of a visual, newlines at 1."""

    needs_tower = True

    def __init__(self, settings: Settings, entropy_input: Literal["pixels", "normalized"]) -> None:
        self.settings, self.entropy_input = settings, entropy_input

    def read_tower(self, attention: TowerAttention) -> Tensor:
        return global_attention(attention, self.settings.threshold)

    def score(self, context: Context) -> list[Tensor]:
        scores = []
        for span, views in zip(context.spans, context.readings):
            if self.settings.entropy_weight:
                entropies = self.entropy(span, context.engine.host)
                views = [
                    view + self.settings.entropy_weight * entropy.softmax(dim=0).to(view.device)
                    for view, entropy in zip(views, entropies)
                ]
            scores.append(context.per_token(span, views, 1.0).float())
        return scores

    def entropy(self, span: Span, host: Any) -> list[Tensor]:
        """[N] of each view, in bits."""
        pixels = host.pixels(span.visual.capture)[span.visual.views.start : span.visual.views.stop].float()
        if self.entropy_input == "pixels":
            siglip = "siglip" in type(host.tower).__name__.lower() or host.name == "SmolVLM"
            mean = [0.5] * 3 if siglip else [0.48145466, 0.4578275, 0.40821073]
            std = [0.5] * 3 if siglip else [0.26862954, 0.26130258, 0.27577711]
            pixels = pixels * pixels.new_tensor(std)[:, None, None] + pixels.new_tensor(mean)[:, None, None]
        maps = patch_entropy(pixels, host.config.vision_config.patch_size).flatten(1)
        return host.merge_patches([maps], span.visual.capture)


class CarriedScorer(Scorer):
    """The importance found before the language model."""

    def score(self, context: Context) -> list[Tensor]:
        return context.pick(context.carried["importance"])


class VFlowOpt(Pruner):
    """VFlowOpt on any supported model.

    Args:
        settings: a published budget (0.5, 0.25 or 0.1, found for LLaVA-OneVision-7B), or `Settings`, for example from
            the search.
        layers: prune before these decoder layers (0-based); None: a third and two thirds of the depth (9 and 18 of 28).
        recycling: `"auto"` recycles where a sample has one image (the authors do not for videos and several images);
            True or False forces it.
        tower_layer: whose attention map counts; None: the layer that makes the features the model uses.
        entropy_input: `"pixels"` restores 0..255 first; `"normalized"` is what the released code computes.
        scope: inside the decoder, `"global"` ranks all images of a sample together as the authors do.

    Raises:
        InvalidInputError: for ratios outside (0, 1], or numbers that do not fit the layers.
    """

    def __init__(
        self,
        settings: float | Settings = 0.25,
        *,
        layers: Sequence[int] | None = None,
        recycling: bool | Literal["auto"] = "auto",
        tower_layer: int | None = None,
        entropy_input: Literal["pixels", "normalized"] = "pixels",
        scope: Literal["per_image", "global"] = "global",
        positions: Positions = "auto",
    ) -> None:
        if not isinstance(settings, Settings):
            if settings not in PUBLISHED:
                raise InvalidInputError(
                    f"settings are Settings(...) or one of the published budgets {sorted(PUBLISHED)}, got {settings!r}"
                )
            settings = PUBLISHED[settings]
        for ratio in settings.ratios:
            check_ratio("a ratio of VFlowOpt", ratio)
        if settings.cell_size <= 0 or settings.threshold < 0:
            raise InvalidInputError(f"cell_size must be positive and threshold not negative, got {settings}")
        if recycling not in (True, False, "auto"):
            raise InvalidInputError(f"recycling is True, False or 'auto', got {recycling!r}")
        if entropy_input not in ("pixels", "normalized"):
            raise InvalidInputError(f"entropy_input is 'pixels' or 'normalized', got {entropy_input!r}")
        self.settings, self.recycling, self.layers = settings, recycling, None if layers is None else tuple(layers)
        self.tower_layer, self.entropy_input = tower_layer, entropy_input
        self.scope, self.positions = scope, positions
        # The stages before a model is known stand for 28 layers; `stages_for` places them.
        super().__init__(self._stages(28))

    def stages_for(self, host: Any) -> list[Stage]:
        return self._stages(len(host.layers))

    def _stages(self, depth: int) -> list[Stage]:
        later = self.settings.ratios[1:]
        layers = self.layers
        if layers is None:
            layers = tuple(max(1, int((number + 1) * depth / (len(later) + 1))) for number in range(len(later)))
        if len(layers) != len(later):
            raise InvalidInputError(f"{len(later)} later ratios need as many layers, got {layers}")
        stages = [
            Stage(
                "tower",
                self._first,
                ImportanceScorer(self.settings, self.entropy_input),
                self._merge,
                layer=self.tower_layer,
                positions=self.positions,
                name="VFlowOpt",
                count=rounded_drop(self.settings.ratios[0]),
            )
        ]
        for layer, ratio in zip(layers, later):
            check_layer("a layer of VFlowOpt", layer)
            selector = TopK(rounded_drop(ratio), self.scope)
            stages.append(Stage("decoder", selector, CarriedScorer(), layer=layer, positions="keep", name="VFlowOpt"))
        return stages

    def _first(self, scores: list[Tensor], context: Context) -> list[Tensor]:
        importance = torch.zeros(context.valid.shape, device=context.hidden.device)
        for span, score in zip(context.spans, scores):
            importance[span.sample, span.index] = score
        context.carried["importance"] = importance
        count = rounded_drop(self.settings.ratios[0])
        return [best(score, count(len(span), len(span))) for span, score in zip(context.spans, scores)]

    def _merge(self, kept: list[Tensor], scores: list[Tensor], context: Context) -> list[Selection]:
        images = dict.fromkeys((span.sample for span in context.spans), 0)
        for span in context.spans:
            images[span.sample] += 1
        selections = []
        for one, score, span in zip(kept, scores, context.spans):
            alone = span.visual.kind == "image" and images[span.sample] == 1
            if not (alone if self.recycling == "auto" else self.recycling) or self.settings.ratios[0] == 1:
                selections.append(Selection(one))
                continue
            places, values, _, _ = recycle(
                context.features(span), score, span.visual.blocks(), self.settings.ratios[0], self.settings.cell_size
            )
            selections.append(Selection(places, values))
        return selections
