"""The state of one forward pass under a pruner.

Shape letters: B batch, S tokens now, q new tokens of this call, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vistok.pruners.records import Record
from vistok.pruners.report import StageReport
from vistok.pruners.stages import Span

__all__ = ["Flow", "gather_rows"]


@dataclass
class Flow:
    """The state of one forward pass of the language model."""

    record: Record
    cache: Any
    cache_name: str
    base_positions: Tensor | None  # [B, q], the library's; None for several axes
    mask: Tensor | None  # the library's 2-D mask of all columns
    covered: int  # library columns before this call
    new: int  # tokens of this call
    spans: list[Span] = field(default_factory=list)
    valid: Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    positions: Tensor | None = None  # [..., B, S], of the current level
    removed_before: Tensor | None = None
    source: Tensor | None = None
    order: Tensor = field(default_factory=lambda: torch.empty(0))  # of the last pruning: where tokens stood before
    carried: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    tables: tuple[Tensor, Tensor] | None = None  # of the current level, where it differs from the library's
    level: int = 0
    prepared: dict[int, dict[str, Any]] = field(default_factory=dict)
    finite: list[Tensor] = field(default_factory=list)
    ascending: list[Tensor] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    counts: list[tuple[int, list[int], list[int], int]] = field(default_factory=list)
    unpruned: list[int] = field(default_factory=list)

    @property
    def pruning(self) -> bool:
        return bool(self.spans)


def gather_rows(values: Tensor, order: Tensor) -> Tensor:
    """Rows `order` [B, S'] of `values` [B, S, D]; `index_select` where there is one sample, which is much faster."""
    if values.shape[0] == 1:
        return values[0].index_select(0, order[0])[None]
    return values.gather(1, order[..., None].expand(-1, -1, values.shape[-1]))
