"""What a pruner is made of: stages of place, layer, scorer, selector, merger.

A stage acts at one place of the model, scores the visual tokens that are alive there, selects those that stay and, if
it likes, merges the others into them:

- `"tower"`: before the language model, from one attention map of the vision tower (P1);
- `"embeddings"`: before the language model, from the projected tokens (P2);
- `"decoder"`: before decoder layer `layer` (0-based, at least 1), from hidden states, queries and keys (P3).

A new method is usually one scorer: a class with `score(context) -> [scores of each visual]`. See docs/pruners.md.

Shape letters: B batch, S tokens of the sequence now, n tokens of one visual alive now, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

if TYPE_CHECKING:
    from vistok.pruners.hosts.base import TowerAttention, Visual

__all__ = [
    "Context",
    "Count",
    "Place",
    "Positions",
    "Scorer",
    "Selection",
    "Span",
    "Stage",
    "TopK",
    "best",
    "check_layer",
    "check_ratio",
    "fixed_count",
    "placed_layers",
    "rounded_drop",
    "truncated_keep",
]

Place = Literal["tower", "embeddings", "decoder"]
Positions = Literal["auto", "renumber", "keep"]
Count = Callable[[int, int], int]
"""Tokens to keep, from those alive now and those that shares are counted from (`Span.first`)."""


@dataclass
class Span:
    """One image, video or tile inside the sequence of one sample.

    Attributes:
        sample: row of the batch.
        visual: what it shows, and how its tokens lie on its views.
        tokens: int64 [n], which of the visual's first tokens are alive, ascending.
        index: int64 [n], where they stand in the sequence now.
        first: tokens that shares are counted from: those of the visual before the language model, and those that
            entered it inside.
    """

    sample: int
    visual: Visual
    tokens: Tensor
    index: Tensor
    first: int = 0

    def __post_init__(self) -> None:
        self.first = self.first or self.visual.tokens

    def __len__(self) -> int:
        return self.index.shape[0]


@dataclass(frozen=True)
class Selection:
    """What stays of one span.

    Attributes:
        kept: int64 [K], ascending positions inside the span.
        values: [K, D] that replace the states of these tokens, or None.
        tokens: int64 [K], which of the visual's first tokens the values stand for, where that is not `kept`.
    """

    kept: Tensor
    values: Tensor | None = None
    tokens: Tensor | None = None


@dataclass
class Context:
    """What a stage may look at.

    Attributes:
        spans: the visuals of all samples, in order.
        hidden: [B, S, D], embeddings before the language model, or hidden states before the decoder layer.
        valid: bool [B, S], False for padding.
        carried: [B, S] vectors that scorers gather over layers; they shrink with the sequence.
        number: of the stage in the pruner.
        readings: what `Scorer.read_tower` returned, view by view, in the order of the tower.
        terms: a scorer leaves the parts of its score here by name, span by span; the report shows them.
        engine: the run itself, for attention rows of decoder layers (`received`, `text_rows`, `last_row`).
    """

    spans: list[Span]
    hidden: Tensor
    valid: Tensor
    engine: Any
    layer: int | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    readings: Any = None
    number: int = 0
    terms: dict[str, list[Tensor]] = field(default_factory=dict)

    def features(self, span: Span) -> Tensor:
        """Hidden states [n, D] of one span."""
        return self.hidden[span.sample].index_select(0, span.index)

    def pick(self, values: Tensor) -> list[Tensor]:
        """Entries of `values` [B, S] at every span."""
        return [values[span.sample].index_select(0, span.index) for span in self.spans]

    def per_token(self, span: Span, views: Sequence[Tensor], newline: float) -> Tensor:
        """Values of a span's views `[tokens of a view]`, packed like its tokens: [n] of those alive."""
        packed = span.visual.pack([view[:, None] for view in views], newline)[:, 0]
        return packed.index_select(0, span.tokens)


class Scorer:
    """How much each visual token matters. Subclasses implement `score`; the rest is optional."""

    needs_tower = False
    """Whether `read_tower` must see an attention map of the tower."""

    def read_tower(self, attention: TowerAttention) -> Any:
        """Reduce one attention map of the tower (several views at once) as soon as it exists; a list over its views."""
        raise TypeError(f"{type(self).__name__} does not define read_tower(attention)")

    def watch(self, host: Any, handle: Any, engine: Any) -> None:
        """Register hooks that gather something during prefill, in `engine.carried`."""

    def score(self, context: Context) -> list[Tensor]:
        """float32 [n] for every span of the context; the largest stay."""
        raise TypeError(f"{type(self).__name__} does not define score(context)")


Selector = Callable[[list[Tensor], Context], list[Tensor]]
Merger = Callable[[list[Tensor], list[Tensor], Context], list[Selection]]


@dataclass(frozen=True)
class Stage:
    """One act of pruning.

    Attributes:
        place: where it happens.
        layer: decoder layer before which it happens (0-based, >= 1), or the tower layer whose attention it reads
            (negative counts from the end; None: the layer that makes the features the model uses).
        scorer: gives each visual token a score, or None where the selector needs none.
        selector: scores of all spans -> kept positions of each, ascending.
        merger: folds dropped tokens into kept ones; None drops them.
        positions: `"renumber"` closes the gaps in the rotary positions, `"keep"` leaves them, `"auto"` renumbers
            unless the model has several rotary axes.
        name: what the report calls it.
        count: how many tokens it keeps, for planning costs without a model; a `TopK` selector knows it by itself.
    """

    place: Place
    selector: Selector
    scorer: Scorer | None = None
    merger: Merger | None = None
    layer: int | None = None
    positions: Positions = "auto"
    name: str = ""
    count: Count | None = None

    def __post_init__(self) -> None:
        if self.place not in ("tower", "embeddings", "decoder"):
            raise InvalidInputError(f"a stage's place is 'tower', 'embeddings' or 'decoder', got {self.place!r}")
        if self.positions not in ("auto", "renumber", "keep"):
            raise InvalidInputError(f"positions are 'auto', 'renumber' or 'keep', got {self.positions!r}")
        if self.place == "decoder" and (self.layer is None or self.layer < 1):
            raise InvalidInputError(
                f"a decoder stage acts before a layer from 1 on, got {self.layer}; to prune before layer 0 use the "
                "place 'embeddings'"
            )

    def planned(self, now: int, first: int) -> int:
        """Tokens that stay of `now` alive and `first` at first.

        Raises:
            InvalidInputError: if the stage's number depends on the picture.
        """
        count = self.count or getattr(self.selector, "count", None)
        if count is None:
            raise InvalidInputError(f"{self.name or 'this stage'} keeps a number of tokens that depends on the picture")
        return count(now, first)

    def select(self, context: Context) -> tuple[list[Selection], list[Tensor]]:
        """Selections and scores, span by span."""
        scores = [] if self.scorer is None else self.scorer.score(context)
        kept = self.selector(scores, context)
        if self.merger is None:
            return [Selection(one) for one in kept], scores
        return self.merger(kept, scores, context), scores


# -------------------------------------------------------------------------------------------------------- selectors


def best(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores [n], ascending; of equal scores the lower index wins."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def truncated_keep(ratio: float, least: int = 0) -> Count:
    """`int(N * ratio)` of the first N tokens, at least `least`."""
    return lambda now, first: min(now, max(least, int(first * ratio)))


def rounded_drop(ratio: float, of: Literal["now", "first"] = "now") -> Count:
    """All but `round(n * (1 - ratio))` tokens (Python's rounding, half to even)."""

    def count(now: int, first: int) -> int:
        total = now if of == "now" else first
        return min(now, total - round(total * (1 - ratio)))

    return count


def fixed_count(number: int) -> Count:
    """The same number of tokens whatever the image; all where it has fewer."""
    return lambda now, first: min(now, number)


class TopK:
    """Keep the best `count(now, first)` tokens.

    Args:
        count: rule of the number.
        scope: `"per_image"` gives every image its own number; `"global"` ranks all images of a sample together.
    """

    def __init__(self, count: Count, scope: Literal["per_image", "global"] = "per_image") -> None:
        if scope not in ("per_image", "global"):
            raise InvalidInputError(f"scope is 'per_image' or 'global', got {scope!r}")
        self.count, self.scope = count, scope

    def counted(self, now: int, first: int) -> int:
        """The number to keep.

        Raises:
            InvalidInputError: if the rule gives more tokens than there are, or a negative number.
        """
        number = self.count(now, first)
        if not 0 <= number <= now:
            raise InvalidInputError(f"a selector is to keep {number} of {now} tokens; its rule must give 0 to {now}")
        return number

    def __call__(self, scores: list[Tensor], context: Context) -> list[Tensor]:
        if self.scope == "per_image":
            return [best(score, self.counted(len(span), span.first)) for score, span in zip(scores, context.spans)]
        kept: dict[int, Tensor] = {}
        for sample in {span.sample for span in context.spans}:
            members = [number for number, span in enumerate(context.spans) if span.sample == sample]
            lengths = [len(context.spans[number]) for number in members]
            first = sum(context.spans[number].first for number in members)
            chosen = best(torch.cat([scores[number] for number in members]), self.counted(sum(lengths), first))
            start = 0
            for number, length in zip(members, lengths):
                kept[number] = chosen[(chosen >= start) & (chosen < start + length)] - start
                start += length
        return [kept[number] for number in range(len(context.spans))]


# ------------------------------------------------------------------------------------------------------------- checks


def check_ratio(name: str, ratio: float) -> float:
    """A share of tokens in (0, 1].

    Raises:
        InvalidInputError: for anything else.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise InvalidInputError(f"{name} is a share of tokens in (0, 1], got {ratio!r}; 0.25 keeps a quarter")
    return float(ratio)


def placed_layers(wanted: Sequence[int], depth: int, first: int = 1) -> tuple[int, ...]:
    """Layer numbers moved as little as it takes to be ascending, distinct and inside `first .. depth - 1`.

    Raises:
        InvalidInputError: if there are fewer such layers than numbers.
    """
    if depth - first < len(wanted):
        raise InvalidInputError(
            f"{len(wanted)} pruning layers do not fit a decoder of {depth} layers that can be pruned from layer "
            f"{first} on; use a method that acts before the language model"
        )
    placed: list[int] = []
    for number, layer in enumerate(wanted):
        least = placed[-1] + 1 if placed else first
        most = depth - (len(wanted) - number)  # room for those to come
        placed.append(min(most, max(least, layer)))
    return tuple(placed)


def check_layer(name: str, layer: int, least: int = 1) -> int:
    """A layer number.

    Raises:
        InvalidInputError: if it is no integer from `least` on.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < least:
        raise InvalidInputError(f"{name} is a layer number from {least} on, got {layer!r}")
    return layer
