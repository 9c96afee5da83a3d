"""What a pruner did in its last prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vistok.pruners.cost import Convention, DecoderShape, kv_bytes, paper_macs, prefill_flops

__all__ = ["Report", "StageReport", "VisualReport"]


@dataclass(frozen=True)
class VisualReport:
    """One visual after one stage.

    Attributes:
        sample: row of the batch.
        kind: `"image"` or `"video"`.
        tokens: how many tokens it had at first.
        kept: int64 [K], which of these are alive, ascending.
        scores: float32 [n] of the tokens alive before the stage, or None where the stage scores nothing.
        before: int64 [n], which of the first tokens these scores belong to.
        terms: parts of the scores by name.
    """

    sample: int
    kind: str
    tokens: int
    kept: Tensor
    before: Tensor
    scores: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    visual: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class StageReport:
    """One stage: where it acted, and what it kept of every visual."""

    name: str
    place: str
    layer: int | None
    visuals: list[VisualReport]


@dataclass(frozen=True)
class Report:
    """The last prefill with visual tokens.

    Attributes:
        stages: what each stage kept.
        tokens_per_layer: tokens of each decoder layer's prefill, row by row of the batch (padding not counted).
        visual_per_layer: of these, the visual ones.
        unpruned: tokens of each row without pruning.
        unpruned_visual: of these, the visual ones.
        cached_per_layer: columns that the cache holds of each layer (padding counted).
        source: int64 [B, S'], which prompt position each row of the last hidden states comes from; -1 for padding.
        shape: widths of the decoder.
        bytes_per_value: of the cache.
    """

    stages: list[StageReport]
    tokens_per_layer: list[list[int]]
    visual_per_layer: list[list[int]]
    unpruned: list[int]
    unpruned_visual: list[int]
    cached_per_layer: list[int]
    source: Tensor
    shape: DecoderShape
    bytes_per_value: int

    def kept(self, stage: int = -1) -> list[Tensor]:
        """Indices kept of every visual after a stage, in the numbering of its first tokens."""
        return [visual.kept for visual in self.stages[stage].visuals]

    @property
    def average_kept(self) -> float:
        """Visual tokens kept on average over the decoder's depth, as a share."""
        alive = sum(sum(row) for row in self.visual_per_layer)
        return alive / (self.shape.layers * max(1, sum(self.unpruned_visual)))

    @property
    def flops(self) -> float:
        """Floating point operations of the decoder's prefill, all tokens and rows."""
        return sum(prefill_flops(self.shape, row) for row in self.tokens_per_layer)

    @property
    def unpruned_flops(self) -> float:
        """The same without pruning."""
        return sum(prefill_flops(self.shape, [count] * self.shape.layers) for count in self.unpruned)

    def paper_macs(self, convention: Convention = "transprune") -> float:
        """Multiply-adds in the convention of a paper (visual tokens; all tokens for VisionZip)."""
        rows = self.tokens_per_layer if convention == "visionzip" else self.visual_per_layer
        return sum(paper_macs(self.shape, row, convention) for row in rows)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the prompt's keys and values as the cache holds them (padding included)."""
        return len(self.unpruned) * kv_bytes(self.shape, self.cached_per_layer, self.bytes_per_value)

    @property
    def unpruned_kv_bytes(self) -> int:
        """Bytes without pruning, padding included."""
        longest = [max(self.unpruned, default=0)] * self.shape.layers
        return len(self.unpruned) * kv_bytes(self.shape, longest, self.bytes_per_value)

    def __str__(self) -> str:
        lines = []
        for stage in self.stages:
            where = stage.place if stage.layer is None else f"{stage.place} {stage.layer}"
            counts = ", ".join(f"{len(visual.kept)}/{visual.tokens}" for visual in stage.visuals)
            lines.append(f"{stage.name or 'stage'} ({where}): {counts}")
        lines.append(
            f"kept over depth {100 * self.average_kept:.1f} %, prefill {self.flops / 1e9:.4g} GFLOPs "
            f"({100 * self.flops / max(1.0, self.unpruned_flops):.1f} %), cache {self.kv_bytes / 2**20:.4g} MiB "
            f"({100 * self.kv_bytes / max(1, self.unpruned_kv_bytes):.1f} %)"
        )
        return "\n".join(lines)
