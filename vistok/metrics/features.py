"""A small network whose penultimate features measure distances between sets of lab scenes (FID in the lab world).

Inception's features know photographs, need a download and say little about coloured shapes. This network reads what a
lab scene holds (shape, colour, size, shade and position of each object, and their number), so features that agree in
distribution mean scenes that agree in what they show. It is trained by `recipes/features-shapes.yaml`, ships as
`features-shapes` and is an ordinary extractor for `vistok.metrics.FrechetDistance`.

Shape letters: B images, H rows and W columns of pixels, D features, S object slots (the i-th object from the left).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vistok.data.shapes import COLOURS, SHADES, SHAPES, SIZES, Scene
from vistok.errors import InvalidInputError
from vistok.nn.model import VistokModel

__all__ = ["ShapesFeatures", "scene_targets"]

SLOTS = 3
ATTRIBUTES: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "size": SIZES, "shade": SHADES}
POSITION_WEIGHT = 10.0  # positions are fractions of the side: an error of a twentieth should matter


def scene_targets(scenes: Sequence[Scene]) -> Tensor:
    """What the network should read in each scene.

    Returns:
        float32 [B, S, 6]: numbers of shape, colour, size and shade in their lists, then x and y of the centre as
        fractions of the side. Objects are ordered from left to right; empty slots hold -1.
    """
    targets = torch.full((len(scenes), SLOTS, 6), -1.0)
    for row, scene in enumerate(scenes):
        for slot, item in enumerate(sorted(scene.objects, key=lambda item: item.centre)):
            numbers = [names.index(getattr(item, kind)) for kind, names in ATTRIBUTES.items()]
            targets[row, slot] = torch.tensor([*numbers, *item.centre])
    return targets


class _Block(nn.Module):
    """Residual block: two 3x3 convolutions with group norms; the first may halve the resolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(hidden)))


class ShapesFeatures(VistokModel):
    """Reads lab scenes; `forward` gives the penultimate features.

    Args:
        base_channels: width after the first convolution, a multiple of 8; later levels have two and four times as many.
        num_features: D, size of the features.
        image_size: side in pixels that the network works at; a multiple of 16. Other sizes are resized.
    """

    system = "shapes-features"

    @register_to_config
    def __init__(self, base_channels: int = 32, num_features: int = 128, image_size: int = 64) -> None:
        super().__init__()
        self.image_size, self.num_features = image_size, num_features
        if base_channels % 8 or image_size % 16:
            raise InvalidInputError(
                f"base_channels must be a multiple of 8 and image_size of 16; got {base_channels} and {image_size}"
            )
        width = base_channels
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(
            _Block(width, 2 * width, stride=2),
            _Block(2 * width, 4 * width, stride=2),
            _Block(4 * width, 4 * width, stride=1),
        )
        self.norm = nn.GroupNorm(8, 4 * width)
        self.squeeze = nn.Conv2d(4 * width, 2 * width, 3, stride=2, padding=1)
        # Flattened, not averaged: where an object lies is part of what a scene shows.
        self.project = nn.Linear(2 * width * (image_size // 16) ** 2, num_features)
        # Features of unit variance keep distances of two trainings comparable.
        self.feature_norm = nn.LayerNorm(num_features)
        self.heads = nn.ModuleDict(
            {
                # One more shape: "nothing in this slot".
                kind: nn.Linear(num_features, SLOTS * (len(names) + (kind == "shape")))
                for kind, names in ATTRIBUTES.items()
            }
        )
        self.heads["position"] = nn.Linear(num_features, SLOTS * 2)
        self.heads["count"] = nn.Linear(num_features, SLOTS)

    @classmethod
    def tiny(cls, **overrides: Any) -> ShapesFeatures:
        """Random flavour of 8 channels and 16 features."""
        return cls(**{"base_channels": 8, "num_features": 16, **overrides}).eval()

    @property
    def evaluator(self) -> str:
        """What to print beside a distance."""
        return f"ShapesFeatures, {self.num_features} penultimate features"

    @property
    def resize(self) -> str:
        """What happens to images before they are read."""
        return f"to {self.image_size}x{self.image_size} if of another size, bilinear with antialias"

    def feature_map(self, images: Tensor) -> Tensor:
        """Features [B, 4 * base_channels, image_size / 8, image_size / 8] of images [B, 3, H, W] in [-1, 1].

        What lies where: a teacher for representation losses.

        Raises:
            InvalidInputError: if the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InvalidInputError(f"images must be [B, 3, H, W] in [-1, 1]; got {list(images.shape)}")
        size = self.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return self.norm(self.blocks(self.stem(images.to(self.dtype))))

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3, H, W] in [-1, 1].

        Raises:
            InvalidInputError: if the images have another shape.
        """
        hidden = F.silu(self.squeeze(F.silu(self.feature_map(images))))
        return self.feature_norm(self.project(hidden.flatten(1)))

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of what the images show.

        Returns:
            `shape` [B, S, 9] (the last one: nothing), `colour` [B, S, 8], `size` [B, S, 2], `shade` [B, S, 3],
            `position` [B, S, 2] (x, y) as fractions of the side, `count` [B, 3] for 1, 2 or 3 objects.
        """
        features = self(images)
        outputs = {kind: head(features).unflatten(1, (SLOTS, -1)) for kind, head in self.heads.items()}
        return {**outputs, "count": outputs["count"].squeeze(-1)}

    def training_loss(self, batch: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Cross-entropy of the attributes, squared error of the positions.

        Args:
            batch: `images` [B, 3, H, W] in [-1, 1] and `objects` float [B, S, 6] from `scene_targets`.
            generator: unused, the objective draws nothing.

        Returns:
            `loss`; one term each for `shape`, `colour`, `size`, `shade`, `position` and `count`; `accuracy`, the share
            of images whose every shape and colour is read rightly.
        """
        targets = batch["objects"].to(self.device)
        seen = self.read(batch["images"])
        present = targets[..., 0] >= 0
        labels = {kind: targets[..., number].long() for number, kind in enumerate(ATTRIBUTES)}
        labels["shape"] = labels["shape"].where(present, len(SHAPES))
        losses = {
            kind: F.cross_entropy(seen[kind].flatten(0, 1), labels[kind].flatten(), ignore_index=-1)
            for kind in ATTRIBUTES
        }
        losses["position"] = POSITION_WEIGHT * F.mse_loss(seen["position"][present], targets[..., 4:][present])
        losses["count"] = F.cross_entropy(seen["count"], present.sum(1) - 1)
        with torch.no_grad():
            shapes_right = seen["shape"].argmax(-1) == labels["shape"]
            colours_right = (seen["colour"].argmax(-1) == labels["colour"]) | ~present
            accuracy = (shapes_right & colours_right).all(1).float().mean()
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "accuracy": accuracy}
