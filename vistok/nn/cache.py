"""Key-value cache. Letters: B rows, H key-value heads, S slots, L positions, C channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache", "LayerCache"]


class LayerCache:
    """Keys and values of one layer in the order in which they were decoded, preallocated."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.length = keys, values, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [B, H, L, C] more; returns views of everything stored so far."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` a layer. What may be seen is always the filled prefix, so no mask is ever needed for it."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        slots: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch, num_heads, slots, head_dim)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(num_layers)
        ]

    @property
    def length(self) -> int:
        """Positions stored."""
        return self.layers[0].length

    def select_rows(self, rows: Tensor | slice) -> None:
        """Keep (or repeat, with an int64 index) rows of the batch."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def reserve(self, slots: int) -> None:
        """Make room for `slots` more positions."""
        slots += self.length
        for layer in self.layers:
            for name in ("keys", "values"):
                old: Tensor = getattr(layer, name)
                new = old.new_empty((*old.shape[:2], slots, old.shape[3]))
                new[:, :, : layer.length] = old[:, :, : layer.length]
                setattr(layer, name, new)
