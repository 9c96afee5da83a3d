"""Pictures to tensors and back, as the evaluation and training scripts of the VQ tokenizer do it.

The centre crop is ADM's (Dhariwal and Nichol, arXiv 2105.05233): halve with a box filter while the picture is at least
twice too large, resize bicubically so that it just covers the target, cut out the centre.

Shape letters: B images, H, W pixels, S side of a square crop.
"""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["center_crop", "random_crop", "ten_crop", "to_tensor", "to_uint8"]


def _box(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture, keeping its proportions, so that it just covers `height` x `width`."""
    if height < 1 or width < 1:
        raise InvalidInputError(f"the target size must be at least 1x1; got {height}x{width}")
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Scale to cover the target and cut out the centre (ADM's centre crop for a square).

    Args:
        image: any size.
        size: side of a square, or (height, width), in pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    image = _cover(image, height, width)
    return _box(image, (image.width - width) // 2, (image.height - height) // 2, width, height)


def random_crop(
    image: Image.Image,
    size: int,
    *,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
    rng: random.Random | None = None,
) -> Image.Image:
    """A random square crop of a randomly scaled picture, the augmentation of tokenizer training.

    Args:
        image: any size.
        size: side S of the crop in pixels.
        min_fraction: smallest part of the short side that the crop may show, in (0, max_fraction].
        max_fraction: largest part, at most 1.
        rng: source of the three draws (short side, then top, then left); Python's global one if None.

    Raises:
        InvalidInputError: if the fractions are not ordered within (0, 1].
    """
    if not 0.0 < min_fraction <= max_fraction <= 1.0:
        raise InvalidInputError(
            f"expected 0 < min_fraction <= max_fraction <= 1; got {min_fraction} and {max_fraction}"
        )
    draw = (rng or random).randrange
    short = draw(math.ceil(size / max_fraction), math.ceil(size / min_fraction) + 1)
    image = _cover(image, short, short)
    top = draw(image.height - size + 1)
    left = draw(image.width - size + 1)
    return _box(image, left, top, size, size)


def ten_crop(image: Image.Image, size: int, *, crop_range: float = 1.1) -> list[Image.Image]:
    """The ten views whose codes a class-conditional generator is trained on.

    The picture is centre-cropped to `int(size * crop_range)`; then come its top left, top right, bottom left, bottom
    right and central squares, and the same five of its mirror image.

    Args:
        image: any size.
        size: side S of each view in pixels.
        crop_range: side of the centre crop relative to S, at least 1 (published: 1.1 and 1.05).
    """
    if crop_range < 1.0:
        raise InvalidInputError(f"crop_range must be at least 1; got {crop_range}")
    image = center_crop(image, int(size * crop_range))
    slack = image.width - size
    middle = round(slack / 2.0)
    corners = [(0, 0), (slack, 0), (0, slack), (slack, slack), (middle, middle)]
    mirror = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [_box(view, left, top, size, size) for view in (image, mirror) for left, top in corners]


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()
    return (pixels.to(torch.float32) / 255.0 - 0.5) / 0.5


def to_uint8(images: Tensor) -> Tensor:
    """[B, 3, H, W] in [-1, 1] as uint8 [B, H, W, 3]: the published trunc(clamp(127.5 x + 128, 0, 255))."""
    return torch.clamp(127.5 * images.detach().float() + 128.0, 0.0, 255.0).permute(0, 2, 3, 1).to(torch.uint8)
