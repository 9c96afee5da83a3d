"""What a cache remembers of pruning: the levels of the decoder, and a class that counts the unpruned prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["Level", "PrunedCache", "Record", "held_length", "pruned_class"]


@dataclass
class Level:
    """The layers between two stages, which see the same tokens.

    Attributes:
        first_layer: the first of these layers.
        valid: bool [B, n], the cached columns that are real tokens.
        removed: int64 [B], visual tokens dropped so far.
        shift: int64 [B], what to subtract from the library's position.
        pruned: whether anything was dropped at or before this level.
        ragged: whether some columns are padding.
        moved: whether its rotary positions differ from those of the first layer.
    """

    first_layer: int
    valid: Tensor
    removed: Tensor
    shift: Tensor
    pruned: bool = False
    ragged: bool = False
    moved: bool = False

    def extend(self, valid: Tensor) -> None:
        self.valid = torch.cat([self.valid, valid], dim=1)


@dataclass
class Record:
    """All levels of one cache, and how many of the library's columns they cover."""

    levels: list[Level]
    full: int = 0

    def repeated(self, batch: int) -> None:
        """Follow a cache whose rows were repeated."""
        rows = self.levels[0].valid.shape[0]
        if rows == batch:
            return
        if batch % rows:
            raise InvalidInputError(
                f"the pruned cache was made for {rows} rows and is used with {batch}; prune again with the new batch"
            )
        for level in self.levels:
            for name in ("valid", "removed", "shift"):
                setattr(level, name, getattr(level, name).repeat_interleave(batch // rows, dim=0))


class PrunedCache:
    """Mixed into the class of a cache whose first layer was shortened: the library counts the unpruned prompt."""

    vistok_record: Record

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = super().get_seq_length(layer_idx)  # type: ignore[misc]
        if layer_idx == 0 and length:
            level = self.vistok_record.levels[0]
            length += self.vistok_record.full - level.valid.shape[1]
        return length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx)  # type: ignore[misc]


_CLASSES: dict[type, type] = {}


def pruned_class(base: type) -> type:
    """The class of a cache whose first layer was shortened."""
    if base not in _CLASSES:
        _CLASSES[base] = type(f"Pruned{base.__name__}", (PrunedCache, base), {})
    return _CLASSES[base]


def held_length(cache: Any, layer: int) -> int:
    """Columns that a cache layer really holds."""
    return cache.layers[layer].get_seq_length() if cache is not None and layer < len(cache.layers) else 0
