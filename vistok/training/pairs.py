"""Lab scenes captioned pair by pair, as CoMPaSS' data engine does it, with its filters or without.

The scenes of two or three objects are annotated with boxes; `vistok.controllers.scop` finds the pairs, words their
relations, and, with `filtered`, keeps the unambiguous ones. Pictures stay whole (the authors crop them around the
pair): lab objects have two sizes, and a crop would make others that the base model never saw.

Shape letters: B pairs, C latent channels, h and w sides of the latents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vistok.controllers.scop import caption_of
from vistok.controllers.scop.annotations import AnnotatedImage, Box
from vistok.controllers.scop.constraints import Thresholds
from vistok.controllers.scop.engine import ScopReport, select_pairs
from vistok.data.shapes import CLASS_NAMES, Scene, sample_scene
from vistok.errors import InvalidInputError

from .recipe import ShapesPairsRecipe, ShapesTokensRecipe
from .sources import Epochs, encode_scenes

__all__ = ["EVERYTHING", "ShapesPairs", "annotated", "scaled_thresholds", "scene_pairs"]

# Rules that every pair of different categories passes.
EVERYTHING = Thresholds(
    min_area=0.0, visual_significance=0.0, spatial_clarity=1e9, minimal_overlap=1e9, size_balance=0.0
)
AUTHORS_SIDE = 512  # pixels of the authors' training images, which `Thresholds.min_area` speaks of


def scaled_thresholds(image_size: int) -> Thresholds:
    """The authors' thresholds for smaller pictures: the others are ratios, the least area counts pixels."""
    return Thresholds(min_area=Thresholds().min_area * (image_size / AUTHORS_SIDE) ** 2)


def annotated(scene: Scene, image_size: int, number: int) -> AnnotatedImage:
    """A scene as the data engine takes annotated images."""
    boxes = []
    for place, item in enumerate(scene.objects):
        x0, y0, x1, y1 = (value * image_size for value in item.box)
        boxes.append(Box(number * len(CLASS_NAMES) + place, item.label, (x0, y0, x1 - x0, y1 - y0)))
    return AnnotatedImage(number, f"{number:012d}.png", image_size, image_size, boxes)


def scene_pairs(
    recipe: ShapesPairsRecipe, stream: int
) -> tuple[list[int], list[list[tuple[str, str, str]]], ScopReport]:
    """The pairs of the recipe's scenes.

    Returns:
        The scene of each pair, its (object, relation, object) triples, and what each rule rejected.
    """
    images = [
        annotated(sample_scene(stream, number, recipe.objects), recipe.image_size, number)
        for number in range(recipe.scenes)
    ]
    thresholds = scaled_thresholds(recipe.image_size) if recipe.filtered else EVERYTHING
    records, report = select_pairs(images, dict(enumerate(CLASS_NAMES)), thresholds)
    return [record.image.image_id for record in records], [record.relations for record in records], report


class ShapesPairs:
    """Pairs of objects as moments and captions (see `ShapesPairsRecipe`); each epoch words a pair anew."""

    def __init__(self, folder: Path, recipe: ShapesPairsRecipe, seed: int) -> None:
        self.file = folder / "moments.npy"
        scenes, self.triples, self.report = scene_pairs(recipe, seed)
        if not scenes:
            raise InvalidInputError(
                f"no pair of the {recipe.scenes} scenes passes every rule; take more scenes:\n{self.report}"
            )
        self.scenes, self.seed = np.array(scenes), seed
        self.order = Epochs(len(scenes), seed)
        self._moments: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:  # workers map the file themselves instead of receiving a copy
        return {**self.__dict__, "_moments": None}

    def batch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`moments` float32 [B, 2C, h, w] and `captions`."""
        if self._moments is None:
            self._moments = np.load(self.file, mmap_mode="r")
        chosen = self.order(numbers)
        captions = []
        for number, pair in zip(numbers.tolist(), chosen.tolist(), strict=True):
            triples = self.triples[pair]
            draws = np.random.default_rng((self.seed, number))
            captions.append(caption_of(*triples[int(draws.integers(len(triples)))]))
        moments = self._moments[self.scenes[chosen]]
        return {"moments": torch.from_numpy(moments.astype(np.float32)), "captions": captions}


def open_pairs(
    recipe: ShapesPairsRecipe,
    tokenizer: Any,
    seed: int,
    cache: Path,
    *,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShapesPairs:
    """The source of a recipe; filtered or not, the scenes are the same and are encoded once (see `encode_scenes`)."""
    scenes = ShapesTokensRecipe(
        "shapes-tokens", "caption", scenes=recipe.scenes, image_size=recipe.image_size, objects=recipe.objects
    )
    folder = encode_scenes(scenes, tokenizer, seed, cache, device=device, on_progress=on_progress)
    if not (folder / "moments.npy").is_file():
        raise InvalidInputError(f"data.source shapes-pairs needs a KL tokenizer; got {type(tokenizer).__name__}")
    return ShapesPairs(folder, recipe, seed)
