"""torch datasets over the lab world, map-style and streaming.

Letters: H, W image height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from vistok.data.shapes.captions import caption
from vistok.data.shapes.render import render
from vistok.data.shapes.scene import Scene, sample_scene
from vistok.errors import InvalidInputError


def image_to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def caption_generator(seed: int, index: int) -> np.random.Generator:
    """The generator that words the caption of scene `index` of stream `seed`, apart from the scene's own draws."""
    return np.random.Generator(np.random.Philox(key=seed | (index << 64), counter=[0, 0, 0, 1]))


class _Items:
    """Makes the item of one scene index; what both datasets share."""

    def __init__(
        self,
        seed: int,
        image_size: int,
        num_objects: int | tuple[int, int] | None,
        attribute_dropout: float,
        return_scene: bool,
        fixed: dict[str, Any],
    ) -> None:
        self.seed = seed
        self.image_size = image_size
        self.num_objects = num_objects
        self.attribute_dropout = attribute_dropout
        self.return_scene = return_scene
        self.fixed = fixed
        self.scene(0)  # raises on bad arguments now, not in a worker

    def scene(self, index: int) -> Scene:
        return sample_scene(self.seed, index, self.num_objects, **self.fixed)

    def item(self, index: int) -> dict[str, Any]:
        scene = self.scene(index)
        words = caption_generator(self.seed, index) if self.attribute_dropout > 0 else None
        item: dict[str, Any] = {
            "image": image_to_tensor(render(scene, self.image_size)),
            "label": scene.label,
            "caption": caption(scene, words, attribute_dropout=self.attribute_dropout),
        }
        if self.return_scene:
            item["scene"] = scene
        return item


class ShapesDataset(Dataset):
    """Map-style dataset: scenes `start` to `start + length - 1` of the stream `seed`.

    Items are `{"image": float32 [3, H, W] in [-1, 1], "label": int in [0, 64), "caption": str}` and, with
    `return_scene`, `"scene": Scene` (then pass `collate_fn=collate`).

    Args:
        length: number of scenes.
        seed: stream; use different seeds for training and held-out scenes.
        image_size: side in pixels.
        num_objects: a number, an inclusive range, or None for 1 to 3.
        attribute_dropout: how often captions leave attributes out; 0 says everything.
        return_scene: adds the scene to each item.
        start: index of the first scene in the stream.
        fixed: `shape`, `colour`, `size`, `shade`, `relation` of `sample_scene`.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        image_size: int = 64,
        num_objects: int | tuple[int, int] | None = None,
        *,
        attribute_dropout: float = 0.25,
        return_scene: bool = False,
        start: int = 0,
        **fixed: Any,
    ) -> None:
        if length < 1:
            raise InvalidInputError(f"length must be at least 1, got {length}")
        self.length = length
        self.start = start
        self._items = _Items(seed, image_size, num_objects, attribute_dropout, return_scene, fixed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items.item(self.start + self._checked(index))

    def scene(self, index: int) -> Scene:
        """The scene behind item `index`, without rendering it."""
        return self._items.scene(self.start + self._checked(index))

    def _checked(self, index: int) -> int:
        if not -self.length <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} scenes")
        return index % self.length


class ShapesStream(IterableDataset):
    """Endless stream of the items of `ShapesDataset`; every worker of every rank gets its own scenes.

    Args:
        seed, image_size, num_objects, attribute_dropout, return_scene, start, fixed: as in `ShapesDataset`.
        rank, world_size: this process among those that share the stream; None asks `torch.distributed`
            (0 of 1 where it is not initialised).
    """

    def __init__(
        self,
        seed: int = 0,
        image_size: int = 64,
        num_objects: int | tuple[int, int] | None = None,
        *,
        attribute_dropout: float = 0.25,
        return_scene: bool = False,
        start: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **fixed: Any,
    ) -> None:
        if (rank is None) != (world_size is None):
            raise InvalidInputError(f"give rank and world_size together, got rank={rank}, world_size={world_size}")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise InvalidInputError(f"rank must lie in [0, {world_size}), got {rank}")
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self._items = _Items(seed, image_size, num_objects, attribute_dropout, return_scene, fixed)

    def indices(self) -> Iterator[int]:
        """The scene indices that this worker of this rank draws, in order."""
        rank, world_size = self.rank, self.world_size
        if rank is None or world_size is None:
            together = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if together else 0
            world_size = torch.distributed.get_world_size() if together else 1
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        index = self.start + rank * workers + worker
        while True:
            yield index
            index += world_size * workers

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in self.indices():
            yield self._items.item(index)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of items: images [B, 3, H, W], labels int64 [B], captions and scenes as lists."""
    batch: dict[str, Any] = {
        "image": torch.stack([item["image"] for item in items]),
        "label": torch.tensor([item["label"] for item in items], dtype=torch.int64),
        "caption": [item["caption"] for item in items],
    }
    if "scene" in items[0]:
        batch["scene"] = [item["scene"] for item in items]
    return batch
