"""Pictures for LLaVA-TokenPacker: padding to a square, and TokenPacker-HD's grids, slices and overview.

Paper: section 3.2 (TokenPacker-HD) of arXiv 2407.02392; details as in the authors' evaluation.

Shape letters: B pictures, K crops, r side of a crop in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vistok.errors import InvalidInputError
from vistok.files import open_image

__all__ = ["CLIP_MEAN", "CLIP_STD", "GRIDS", "choose_grid", "normalize", "pad_to_square", "preprocess", "slice_picture"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PADDING_COLOUR = (122, 116, 104)  # the mean colour, cut to integers
GRID_TARGET = 1.4  # the picture counts as this much larger where grids are compared: finer grids win
OVERLAP_WEIGHT = 0.1

_UP_TO_9 = "1x1 1x2 2x1 1x3 3x1 2x2 1x4 4x1 1x5 5x1 1x6 6x1 2x3 3x2 1x7 7x1 4x2 2x4 1x8 8x1 3x3 1x9 9x1"
_UP_TO_16 = _UP_TO_9 + " 2x5 5x2 2x6 6x2 3x4 4x3 2x7 7x2 3x5 5x3 2x8 8x2 4x4"
_UP_TO_25 = _UP_TO_16 + " 3x6 6x3 2x9 9x2 4x5 5x4 2x10 10x2 3x7 7x3 11x2 2x11 4x6 6x4 12x2 2x12 3x8 8x3 5x5"


def _grids(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(rows), int(cols)) for rows, cols in (one.split("x") for one in text.split()))


# Most crops of a picture -> (rows, cols) to choose from; the first of equals wins, so the order counts.
GRIDS = {9: _grids(_UP_TO_9), 16: _grids(_UP_TO_16), 25: _grids(_UP_TO_25)}


def choose_grid(height: int, width: int, *, max_crops: int = 9, crop_size: int = 336) -> tuple[int, int]:
    """(rows, cols) of crops that a picture fills best.

    The score is the filled part of the canvas plus 0.1 times the overlap (IoU) of the canvas with the picture enlarged
    by 1.4, both from one corner.

    Args:
        height, width: of the picture in pixels.
        max_crops: 9, 16 or 25 (the lists of the released models).
        crop_size: side r of a crop in pixels.

    Raises:
        InvalidInputError: for other values of `max_crops`, or a picture without pixels.
    """
    if max_crops not in GRIDS:
        raise InvalidInputError(f"max_crops must be one of {sorted(GRIDS)}; got {max_crops}")
    if height < 1 or width < 1 or crop_size < 1:
        raise InvalidInputError(f"expected at least one pixel; got {height}x{width} and crops of {crop_size}")
    canvas = torch.tensor(GRIDS[max_crops], dtype=torch.float32) * crop_size
    size = torch.tensor([height, width], dtype=torch.float32)
    scale = (canvas / size).amin(dim=1, keepdim=True)
    filled = (size * scale).round().prod(1) / canvas.prod(1)
    enlarged = size * GRID_TARGET
    common = torch.minimum(canvas, enlarged).prod(1)
    overlap = common / (canvas.prod(1) + enlarged.prod() - common + 1e-5)
    return GRIDS[max_crops][int((filled + OVERLAP_WEIGHT * overlap).argmax())]


def normalize(image: Image.Image) -> Tensor:
    """An RGB picture as float32 [3, H, W], CLIP's mean subtracted, divided by its deviation."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float() / 255.0
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _fitted(height: int, width: int, rows: int, cols: int, crop_size: int) -> tuple[int, int]:
    """Size that keeps the proportions and just fits a grid of crops."""
    tall, wide = rows * crop_size, cols * crop_size
    scale = min(tall / height, wide / width)
    if tall / height <= wide / width:
        return tall, min(wide, round(width * scale))
    return min(tall, round(height * scale)), wide


def _pasted(pixels: Tensor, size: tuple[int, int], canvas: tuple[int, int], antialias: bool) -> Tensor:
    """[3, H, W] resized to `size`, in the top left corner of a canvas of mean colour."""
    size = (max(size[0], 1), max(size[1], 1))
    resized = functional.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=antialias)[0]
    return functional.pad(resized, (0, canvas[1] - size[1], 0, canvas[0] - size[0]))


def slice_picture(
    image: Image.Image | str | os.PathLike[str],
    *,
    max_crops: int = 9,
    crop_size: int = 336,
    antialias: bool = False,
    overview_of_picture: bool = False,
) -> tuple[Tensor, tuple[int, int]]:
    """Cut a picture into crops, row by row, and add an overview if there is more than one.

    Args:
        image: picture of any size, or a path.
        max_crops: 9, 16 or 25.
        crop_size: side r of a crop in pixels.
        antialias: smooth pictures that are shrunk. The released models were trained without.
        overview_of_picture: shrink the picture itself for the overview. The released models got the padded canvas.

    Returns:
        Crops float32 [K, 3, r, r], normalised for CLIP, and the grid (rows, cols).
    """
    pixels = normalize(open_image(image))
    height, width = pixels.shape[-2:]
    rows, cols = choose_grid(height, width, max_crops=max_crops, crop_size=crop_size)
    side = crop_size
    fitted = _fitted(height, width, rows, cols, side)
    canvas = _pasted(pixels, fitted, (rows * side, cols * side), antialias)
    crops = canvas.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    if rows * cols > 1:
        whole = pixels if overview_of_picture else canvas
        overview = _pasted(whole, _fitted(height, width, 1, 1, side), (side, side), antialias)
        crops = torch.cat([crops, overview[None]])
    return crops.contiguous(), (rows, cols)


def pad_to_square(image: Image.Image) -> Image.Image:
    """The picture in the middle of a square of the mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), PADDING_COLOUR)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _cover(image: Image.Image, size: int) -> Image.Image:
    """Bicubic resize of the shorter side to `size` and centre crop, as CLIP's preprocessing does."""
    short, long = sorted(image.size)
    longer = int(size * long / short)
    scaled = (size, longer) if image.width <= image.height else (longer, size)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def preprocess(
    images: Image.Image | str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]],
    *,
    mode: str = "pad",
    image_size: int = 336,
    max_crops: int = 9,
) -> tuple[Tensor, list[tuple[int, int]] | None]:
    """Pictures to tensors for the vision tower.

    Args:
        images: a picture, a path, or several.
        mode: "pad" (the published models: pad to a square, resize), "crop" (shorter side and centre crop) or "slice"
            (the HD models).
        image_size: side in pixels of the tower's input.
        max_crops: of "slice": 9, 16 or 25.

    Returns:
        float32 [K, 3, image_size, image_size] and, for "slice", the grid (rows, cols) of every picture (else None).

    Raises:
        InvalidInputError: unknown mode, no pictures, or a picture that cannot be read.
    """
    if mode not in ("pad", "crop", "slice"):
        raise InvalidInputError(f"mode must be 'pad', 'crop' or 'slice'; got {mode!r}")
    several = [images] if isinstance(images, Image.Image | str | os.PathLike) else list(images)
    if not several:
        raise InvalidInputError("no pictures given")
    if mode == "slice":
        sliced = [slice_picture(image, max_crops=max_crops, crop_size=image_size) for image in several]
        return torch.cat([crops for crops, _ in sliced]), [grid for _, grid in sliced]
    opened = [open_image(image) for image in several]
    squares = [pad_to_square(image) if mode == "pad" else image for image in opened]
    return torch.stack([normalize(_cover(image, image_size)) for image in squares]), None
