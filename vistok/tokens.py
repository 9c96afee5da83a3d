"""`VisualTokens`: the one thing that tokenizers, generators and pruners hand to each other.

Shape letters: B images, N tokens an image, D feature channels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, InvalidInputError
from .files import read_state_dict, save_tensors

__all__ = ["VisualTokens"]

FORMAT = "vistok-tokens-1"


@dataclass(frozen=True)
class VisualTokens:
    """Discrete and/or continuous tokens of a batch of images.

    Attributes:
        ids: int64 [B, N] codebook indices, or None.
        features: float [B, N, D] vectors, or None.
        grid: (rows, cols) of a 2-D layout in raster order with rows * cols == N; None for a 1-D sequence.
        mask: bool [B, N], True where a token is valid; None if all are.

    Raises:
        InvalidInputError: on construction, if nothing is given or the parts disagree.
    """

    ids: Tensor | None = None
    features: Tensor | None = None
    grid: tuple[int, int] | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids is None and self.features is None:
            raise InvalidInputError("VisualTokens needs ids [B, N], features [B, N, D], or both; neither was given")
        if self.ids is not None:
            if self.ids.ndim != 2:
                raise InvalidInputError(f"ids must be [B, N]; got shape {list(self.ids.shape)}")
            if self.ids.dtype != torch.int64:
                raise InvalidInputError(f"ids must be int64; got {self.ids.dtype}: convert them with .long()")
        if self.features is not None:
            if self.features.ndim != 3:
                raise InvalidInputError(f"features must be [B, N, D]; got shape {list(self.features.shape)}")
            if not self.features.is_floating_point():
                raise InvalidInputError(f"features must be floating point; got {self.features.dtype}")
        shape = self.shape
        if self.ids is not None and self.features is not None and self.features.shape[:2] != self.ids.shape:
            raise InvalidInputError(
                f"ids {list(self.ids.shape)} and features {list(self.features.shape)} disagree on images and tokens"
            )
        if self.grid is not None:
            grid = tuple(int(side) for side in self.grid)
            if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != shape[1]:
                raise InvalidInputError(
                    f"grid {self.grid} does not hold {shape[1]} tokens; expected rows * cols == {shape[1]}"
                )
            object.__setattr__(self, "grid", grid)
        if self.mask is not None and (self.mask.dtype != torch.bool or tuple(self.mask.shape) != shape):
            raise InvalidInputError(f"mask must be bool {list(shape)}; got {self.mask.dtype} {list(self.mask.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(images, tokens an image)."""
        held = self.ids if self.ids is not None else self.features
        assert held is not None
        return int(held.shape[0]), int(held.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens an image, N."""
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        held = self.ids if self.ids is not None else self.features
        assert held is not None
        return held.device

    def __len__(self) -> int:
        """Number of images, B."""
        return self.shape[0]

    def __getitem__(self, index: int | slice | Tensor) -> VisualTokens:
        """Some of the images; always a batch, also for a single index."""
        if isinstance(index, int):
            size = len(self)
            if not -size <= index < size:
                raise IndexError(f"image {index} of {size}")  # IndexError ends a for loop over the images
            index = slice(index % size, index % size + 1)

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return VisualTokens(pick(self.ids), pick(self.features), self.grid, pick(self.mask))

    def keep(self, n: int) -> VisualTokens:
        """The first `n` tokens of an ordered 1-D sequence, as tokens that stand for the whole image.

        Raises:
            InvalidInputError: if `n` is outside 1..N, or the tokens form a grid (a prefix of a raster is not an image).
        """
        if self.grid is not None:
            raise InvalidInputError(
                f"keep({n}) takes a prefix of an ordered sequence, but these tokens form a "
                f"{self.grid[0]}x{self.grid[1]} grid; use select(index) instead"
            )
        if not 1 <= n <= self.num_tokens:
            raise InvalidInputError(f"keep({n}): expected between 1 and {self.num_tokens} tokens")
        return self.select(torch.arange(n, device=self.device))

    def select(self, index: Tensor) -> VisualTokens:
        """The tokens at `index` (int64 [K] for all images alike, or [B, K] for each) as a sequence without a grid.

        Raises:
            InvalidInputError: if an index is outside 0..N-1 or the shape fits neither form.
        """
        batch, total = self.shape
        if index.ndim not in (1, 2) or (index.ndim == 2 and index.shape[0] != batch) or index.dtype != torch.int64:
            raise InvalidInputError(f"index must be int64 [K] or [{batch}, K]; got {index.dtype} {list(index.shape)}")
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= total):
            raise InvalidInputError(f"index must lie in 0..{total - 1}; got {int(index.min())}..{int(index.max())}")
        index = index.to(self.device)

        def pick(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            if index.ndim == 1:
                return value.index_select(1, index)
            # A flat index_select copies whole rows; gather with an expanded index is about ten times slower on CPUs.
            rows = torch.arange(batch, device=self.device)[:, None] * total + index
            return value.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (batch, index.shape[1]))

        return VisualTokens(pick(self.ids), pick(self.features), None, pick(self.mask))

    def to(self, *args: Any, **kwargs: Any) -> VisualTokens:
        """`Tensor.to` for every part; a floating dtype applies to the features alone."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise InvalidInputError(f"tokens can be moved to floating point types only (ids stay int64); got {dtype}")

        def move(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            return None if value is None else value.to(device=device, dtype=dtype, non_blocking=non_blocking)

        return replace(self, ids=move(self.ids), features=move(self.features, dtype), mask=move(self.mask))

    def bits(self, codebook_size: int) -> Tensor:
        """Information of each image's ids in bits, int64 [B] rounded up: valid tokens * log2(codebook_size).

        Raises:
            InvalidInputError: without ids, or with ids outside the codebook.
        """
        if self.ids is None:
            raise InvalidInputError("bits() needs ids; these tokens are continuous features only")
        if codebook_size < 1 or (
            self.ids.numel() and not 0 <= int(self.ids.min()) <= int(self.ids.max()) < codebook_size
        ):
            raise InvalidInputError(f"ids must lie in 0..{codebook_size - 1} for a codebook of {codebook_size}")
        valid = self.mask if self.mask is not None else torch.ones_like(self.ids, dtype=torch.bool)
        return torch.ceil(valid.sum(1) * math.log2(codebook_size)).long()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file (atomically)."""
        parts = {"ids": self.ids, "features": self.features, "mask": self.mask}
        metadata = {"format": FORMAT}
        if self.grid is not None:
            metadata["grid"] = f"{self.grid[0]}x{self.grid[1]}"
        save_tensors(path, {name: part for name, part in parts.items() if part is not None}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> VisualTokens:
        """Read a file written by `save`.

        Raises:
            CheckpointError: if the file is not one, or is damaged.
        """
        tensors = read_state_dict(path)
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} holds no visual tokens (expected a file written by VisualTokens.save)")
        grid = None
        if "grid" in metadata:
            rows, cols = metadata["grid"].split("x")
            grid = (int(rows), int(cols))
        return cls(tensors.get("ids"), tensors.get("features"), grid, tensors.get("mask"))
