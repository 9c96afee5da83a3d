"""What X is: how the tokens of a grid become a sequence of entities.

Letters: B images, E entities, T tokens of an entity, N tokens of the sequence, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError

__all__ = ["ENTITIES", "EntityLayout", "annealed_steps", "attention_mask", "entity_layout"]

ENTITIES = ("token", "cell", "subsample", "scale", "image")


@dataclass(frozen=True)
class EntityLayout:
    """How the tokens of a grid become a sequence of entities. Get one from `entity_layout`.

    Attributes:
        grid: (rows, cols) of the image.
        starts: sequence position at which each entity starts, and N at the end.
        places: int64 [N], raster position of each sequence position; of a coarse scale, in the raster of that scale.
        coordinates: float64 [N, 2], row and column of each sequence position in units of tokens of the grid.
        scales: (rows, cols) of each entity's own raster for scale entities, else None.
    """

    grid: tuple[int, int]
    starts: tuple[int, ...]
    places: Tensor
    coordinates: Tensor
    scales: tuple[tuple[int, int], ...] | None

    @property
    def num_entities(self) -> int:
        """E."""
        return len(self.starts) - 1

    @property
    def length(self) -> int:
        """Tokens of the sequence, N (more than the grid has for scale entities)."""
        return self.starts[-1]

    @property
    def uniform(self) -> int | None:
        """T, if all entities have as many tokens; else None."""
        sizes = {stop - start for start, stop in pairwise(self.starts)}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def number(self) -> Tensor:
        """int64 [N], entity of each sequence position."""
        sizes = torch.tensor([stop - start for start, stop in pairwise(self.starts)], device="cpu")
        return torch.arange(self.num_entities, device="cpu").repeat_interleave(sizes)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """Raster tokens [B, rows * cols, C] in entity order [B, N, C]; coarse scales are area averages."""
        if self.scales is None:
            return tokens.index_select(1, self.places.to(tokens.device))
        image = tokens.transpose(1, 2).unflatten(2, self.grid)
        coarse = [functional.adaptive_avg_pool2d(image, size) for size in self.scales[:-1]]
        return torch.cat([*(part.flatten(2).transpose(1, 2) for part in coarse), tokens], dim=1)

    def to_raster(self, sequence: Tensor) -> Tensor:
        """The inverse of `to_sequence`; of scales, the finest."""
        if self.scales is not None:
            return sequence[:, self.starts[-2] :]
        return sequence.index_select(1, torch.argsort(self.places).to(sequence.device))

    def mask(self, *, clean_context: bool = False) -> Tensor:
        """Which position may see which, bool: [N, N], or [2N, 2N] with a clean copy in front.

        An entity sees itself and all earlier ones. With a clean copy, noisy entities see themselves and earlier clean
        ones.
        """
        number = self.number
        causal = number[:, None] >= number
        if not clean_context:
            return causal
        earlier, same = number[:, None] > number, number[:, None] == number
        return torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([earlier, same], 1)])


def _default_scales(rows: int) -> tuple[int, ...]:
    scales = [rows]
    while scales[-1] % 2 == 0:
        scales.append(scales[-1] // 2)
    return tuple(reversed(scales))


@lru_cache(maxsize=16)
def entity_layout(
    grid: tuple[int, int], entity: str, entity_size: int = 8, scales: tuple[int, ...] | None = None
) -> EntityLayout:
    """Divide a grid into entities.

    Args:
        grid: (rows, cols).
        entity: `"token"`, `"cell"` (squares, in raster order), `"subsample"` (tokens at a stride; entity k starts at
            row k div stride, column k mod stride), `"scale"` (the image averaged to coarser grids, coarse to fine, then
            itself) or `"image"`.
        entity_size: side of a cell, or the stride of a subsample; others ignore it.
        scales: rows of each scale, ascending, ending with the grid's; None halves while it can.

    Raises:
        InvalidInputError: unknown entity, or sizes that do not divide the grid.
    """
    rows, cols = grid
    if entity not in ENTITIES:
        raise InvalidInputError(f"entity must be one of {', '.join(ENTITIES)}; got {entity!r}")
    if min(grid) < 1:
        raise InvalidInputError(f"grid must be (rows, cols), both at least 1; got {grid}")
    if entity == "scale":
        with torch.inference_mode(False):
            return _scale_layout(grid, _default_scales(rows) if scales is None else scales)
    if entity in ("cell", "subsample") and (entity_size < 1 or rows % entity_size or cols % entity_size):
        divisors = [side for side in range(1, min(grid) + 1) if rows % side == cols % side == 0]
        raise InvalidInputError(
            f"{entity} entities of size {entity_size} do not divide a {rows}x{cols} grid; possible sizes: {divisors}"
        )
    side = {"token": 1, "image": 1, "cell": entity_size, "subsample": entity_size}[entity]
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        blocks = torch.arange(rows * cols, device="cpu").view(rows // side, side, cols // side, side)
        # A cell holds neighbours, a subsample the tokens at the same place of every cell.
        cells, count = blocks.permute(0, 2, 1, 3), side**2
        if entity == "subsample":
            cells, count = blocks.permute(1, 3, 0, 2), rows * cols // side**2
        elif entity == "image":
            count = rows * cols
        places = cells.flatten()
        coordinates = torch.stack([places // cols, places % cols], dim=1).double()
    return EntityLayout(grid, tuple(range(0, rows * cols + 1, count)), places, coordinates, None)


def _scale_layout(grid: tuple[int, int], scales: Sequence[int]) -> EntityLayout:
    rows, cols = grid
    if not scales or list(scales) != sorted(set(scales)) or scales[0] < 1 or scales[-1] != rows:
        raise InvalidInputError(
            f"scales must be ascending numbers of rows that end with the grid's ({rows}); got {tuple(scales)}"
        )
    if any(scale * cols % rows for scale in scales):
        raise InvalidInputError(
            f"every scale must keep the proportions of the {rows}x{cols} grid with whole columns; got {tuple(scales)}"
        )
    sizes = tuple((scale, scale * cols // rows) for scale in scales)
    starts, places, coordinates = [0], [], []
    for high, wide in sizes:
        place = torch.arange(high * wide, device="cpu")
        centre = torch.stack([place // wide, place % wide], dim=1).double() + 0.5
        # Where the centre of a coarse token lies on the fine grid.
        coordinates.append(centre * centre.new_tensor([rows / high, cols / wide]) - 0.5)
        places.append(place)
        starts.append(starts[-1] + high * wide)
    return EntityLayout(grid, tuple(starts), torch.cat(places), torch.cat(coordinates), sizes)


@lru_cache(maxsize=16)
def attention_mask(
    grid: tuple[int, int],
    entity: str,
    entity_size: int,
    scales: tuple[int, ...] | None,
    clean_context: bool,
    device: torch.device,
) -> Tensor:
    """`EntityLayout.mask` on a device; the last few are kept."""
    with torch.inference_mode(False):  # what is made while sampling must serve training, too
        return entity_layout(grid, entity, entity_size, scales).mask(clean_context=clean_context).to(device)


def annealed_steps(num_entities: int, first: int = 50, last: int = 15) -> tuple[int, ...]:
    """Fewer solver steps for later entities, linear and rounded down: 50, 38, 26, 15 for four (DiSA, arXiv 2505.20297,
    a training-free saving that changes the samples).
    """
    if num_entities == 1:
        return (first,)
    share = [(num_entities - 1 - entity) / (num_entities - 1) for entity in range(num_entities)]
    return tuple(int(rest * (first - last) + last) for rest in share)
