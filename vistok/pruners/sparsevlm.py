"""SparseVLM: text tokens that concern the image rate its tokens; dropped tokens are partly recycled.

Yuan Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv
2410.04417 (version 1, with recycling). Raters are the text tokens that the visual tokens resemble more than average,
found once on the inputs of layer 0. After layers 2, 6 and 15 the attention of the raters, in the layer that has just
run, ranks the visual tokens. Of the dropped ones the best 30 % are clustered by density peaks and come back as
cluster means, placed behind the kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.pruners.pruner import Pruner
from vistok.pruners.stages import Context, Count, Positions, Scorer, Selection, Span, Stage, check_layer

__all__ = ["SETTINGS", "SparseVLM", "cluster_and_merge", "rater_scores"]

SETTINGS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Tokens after each stage for the paper's budgets, of 576."""


def rater_scores(visual: Tensor, text: Tensor) -> Tensor:
    """float32 [T]: softmax over the text tokens of their products with each visual token, mean over visual tokens.

    Args:
        visual: [N, D], text: [T, D]: inputs of the first decoder layer.
    """
    return (visual.float() @ text.float().T).softmax(dim=-1).mean(dim=0)


def cluster_and_merge(tokens: Tensor, clusters: int, noise: Tensor) -> Tensor:
    """Means [clusters, D] of density-peak clusters.

    A token's density is exp of minus the mean squared distance to its `clusters` nearest tokens (itself included); its
    separation is the distance to the nearest token of higher density. Tokens of largest product are the centres, and
    every token joins the nearest centre.

    Args:
        tokens: [n, D].
        noise: [n] in [0, 1), breaks ties; the authors draw it at random.
    """
    values = tokens.float()
    distance = torch.cdist(values, values) / values.shape[-1] ** 0.5
    nearest = distance.topk(min(clusters, len(values)), dim=-1, largest=False).values
    density = (-nearest.square().mean(dim=-1)).exp() + noise * 1e-6
    higher = density[None] > density[:, None]
    separation = torch.where(higher, distance, distance.max()).amin(dim=-1)
    centres = (separation * density).topk(clusters).indices
    label = distance[centres].argmin(dim=0)
    label[centres] = torch.arange(clusters, device=label.device)
    counts = values.new_zeros(clusters).index_add_(0, label, values.new_ones(len(values)))
    weights = 1 / (counts + 1e-6)
    sums = values.new_zeros(clusters, values.shape[-1]).index_add_(0, label, values * weights[label][:, None])
    return sums.to(tokens.dtype)


class _RaterScorer(Scorer):
    """Attention of the raters in the layer that has just run."""

    def __init__(self, layer: int, first: bool) -> None:
        self.layer, self.first = layer, first

    def watch(self, host: Any, handle: Any, engine: Any) -> None:
        engine.remember(self.layer - 1)
        if not self.first:
            return

        def find_raters(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            flow = engine.flow
            if flow is None or not flow.pruning:
                return
            hidden = args[0] if args else kwargs["hidden_states"]
            chosen = torch.zeros(flow.valid.shape, device=hidden.device)
            with torch.no_grad():
                for sample in {span.sample for span in flow.spans}:
                    spans = [span for span in flow.spans if span.sample == sample]
                    visual = torch.cat([span.index for span in spans])
                    text = torch.arange(int(visual.max()) + 1, hidden.shape[1], device=hidden.device)
                    text = text[flow.valid[sample, text]]
                    if len(text):
                        scores = rater_scores(hidden[sample, visual], hidden[sample, text])
                        chosen[sample, text[scores > scores.mean()]] = 1.0
            flow.carried["raters"] = chosen

        handle.hook(host.layers[0].register_forward_pre_hook(find_raters, with_kwargs=True))

    def score(self, context: Context) -> list[Tensor]:
        engine = context.engine
        rows, plain = engine.text_rows(context)
        raters = context.carried["raters"].gather(1, rows)
        total = raters.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, raters / total.clamp_min(1), plain)
        return context.pick(engine.received(context, rows, weights, by="last"))


class SparseVLM(Pruner):
    """SparseVLM (version 1) on any supported model.

    Args:
        tokens: 192, 128, 96 or 64, the paper's budgets; for images of N tokens the numbers are scaled by N / 576.
        counts: tokens after each stage instead.
        layers: prune after these layers (0-based indices of the layers that have run).
        recycle: bring clusters of dropped tokens back.
        seed: of the noise that breaks ties between densities.

    Raises:
        InvalidInputError: for an unknown budget or bad layers.
    """

    def __init__(
        self,
        tokens: Literal[192, 128, 96, 64] = 192,
        *,
        counts: Sequence[int] | None = None,
        layers: Sequence[int] = (2, 6, 15),
        recycle: bool = True,
        seed: int = 0,
        positions: Positions = "auto",
    ) -> None:
        if counts is None and tokens not in SETTINGS:
            raise InvalidInputError(f"tokens is one of {sorted(SETTINGS)}, got {tokens!r}; or give counts")
        chosen = tuple(SETTINGS[tokens] if counts is None else counts)
        if len(chosen) != len(layers):
            raise InvalidInputError(f"{len(layers)} layers need as many counts, got {len(chosen)}")
        if any(count < 1 for count in chosen):
            raise InvalidInputError(f"counts are numbers of tokens from 1 on, got {chosen}")
        self.recycle, self.seed, self.scaled, self.positions = recycle, seed, counts is None, positions
        stages = []
        for number, (layer, count) in enumerate(zip(layers, chosen)):
            check_layer("a layer of SparseVLM", layer, least=0)
            stages.append(self._stage(layer + 1, count, number == 0, positions))
        super().__init__(stages)

    def _stage(self, layer: int, count: int, first: bool, positions: Positions) -> Stage:
        def keep(span: Span) -> int:
            number = max(1, round(count * span.first / 576)) if self.scaled else count
            return max(1, min(number, len(span) - 1))

        def select(scores: list[Tensor], context: Context) -> list[Tensor]:
            return [score.topk(keep(span)).indices.sort().values for score, span in zip(scores, context.spans)]

        def merge(kept: list[Tensor], scores: list[Tensor], context: Context) -> list[Selection]:
            return [self.recycled(one, score, context, span) for one, score, span in zip(kept, scores, context.spans)]

        return Stage(
            "decoder",
            select,
            _RaterScorer(layer, first),
            merge if self.recycle else None,
            layer=layer,
            positions=positions,
            name="SparseVLM",
            count=self._planned(count),
        )

    def _planned(self, count: int) -> Count:
        """Kept tokens and clusters."""

        def planned(now: int, first: int) -> int:
            number = max(1, round(count * first / 576)) if self.scaled else count
            number = max(1, min(number, now - 1))
            if not self.recycle or number == now:
                return number
            return number + int(min(int(0.3 * (now - number)) + 1, now - number) / 10) + 1

        return planned

    def recycled(self, kept: Tensor, score: Tensor, context: Context, span: Span) -> Selection:
        """Kept tokens, then the means of clusters of the best dropped ones."""
        mask = torch.ones(len(span), dtype=torch.bool, device=kept.device)
        mask[kept] = False
        dropped = mask.nonzero()[:, 0]
        if not len(dropped):
            return Selection(kept)
        number = int(0.3 * len(dropped)) + 1
        candidates = dropped[score[dropped].topk(min(number, len(dropped))).indices]
        clusters = int(len(candidates) / 10) + 1
        features = context.features(span)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.rand(len(candidates), generator=generator).to(features.device)
        merged = cluster_and_merge(features[candidates], clusters, noise)
        if self.positions == "keep" or context.engine.host.several_axes:
            # Positions stay, so a cluster stands where one of its candidates stood.
            places, order = torch.cat([kept, candidates[:clusters]]).sort()
            return Selection(places, torch.cat([features[kept], merged])[order])
        # Clusters stand behind the kept tokens; which freed places they use does not matter, as positions close up.
        places = torch.cat([kept, dropped[-clusters:]]).sort().values
        tokens = torch.cat([span.tokens[kept], span.tokens[candidates[:clusters]]])
        return Selection(places, torch.cat([features[kept], merged]), tokens)
