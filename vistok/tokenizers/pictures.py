"""What every image tokenizer does before and after its network: checking batches, pictures in, pictures out.

Shape letters: B images, C channels, H, W pixels, f pixels a token covers in each direction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.files import open_image
from vistok.tokenizers.transforms import center_crop, to_tensor

__all__ = [
    "Pictures",
    "check_images",
    "check_pixels",
    "padded_picture",
    "postprocess_images",
    "preprocess_images",
]

Pictures: TypeAlias = Image.Image | str | os.PathLike[str] | Sequence[Image.Image | str | os.PathLike[str]]
FAR_OUTSIDE = 16.0  # an image in 0..255 is refused, a slight overshoot of a decoder is not


def check_images(images: Tensor, channels: int, factor: int) -> None:
    """Raise InvalidInputError unless `images` is float [B, `channels`, H, W], finite, about [-1, 1], and H and W are
    divisible by `factor`.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise InvalidInputError(f"images must be [B, {channels}, H, W]; got {list(images.shape)}")
    if not images.is_floating_point():
        raise InvalidInputError(f"images must be floating point in [-1, 1]; got {images.dtype}: use preprocess()")
    height, width = images.shape[-2:]
    if height % factor or width % factor or not height or not width:
        low = [max(side // factor, 1) * factor for side in (height, width)]
        high = [max(-(-side // factor), 1) * factor for side in (height, width)]
        raise InvalidInputError(
            f"height and width must be divisible by {factor}; got {height}x{width}: the nearest valid sizes are "
            f"{low[0]}x{low[1]} and {high[0]}x{high[1]} (preprocess() crops; reconstruct() takes any size)"
        )
    check_pixels(images)


def check_pixels(images: Tensor) -> None:
    """Raise InvalidInputError unless the pixels are finite and about [-1, 1]."""
    if not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidInputError("images contain NaN or infinite pixels")
    if max(-low, high) > FAR_OUTSIDE:
        raise InvalidInputError(f"images must lie in [-1, 1]; got {low:.4g}..{high:.4g}: scale them with preprocess()")


def preprocess_images(images: Pictures, size: int | tuple[int, int] | None, factor: int) -> Tensor:
    """Pictures to a batch, float32 [B, 3, H, W] in [-1, 1] on the CPU.

    Args:
        images: a picture, a path, or a list of them.
        size: side of a square or (height, width), divisible by f: pictures are scaled to cover it and cut to the centre
            (ADM's centre crop). None keeps the scale and cuts at most f - 1 pixels a direction, evenly on both sides.
        factor: f.

    Raises:
        InvalidInputError: unreadable pictures, pictures smaller than a token, or unequal sizes without `size`.
    """
    listed = [images] if isinstance(images, (Image.Image, str, os.PathLike)) else list(images)
    if not listed:
        raise InvalidInputError("preprocess() needs at least one image")
    pictures = [open_image(item) for item in listed]
    if size is not None:
        target = (size, size) if isinstance(size, int) else (size[0], size[1])
        if any(side < factor or side % factor for side in target):
            raise InvalidInputError(f"size must be a multiple of {factor}, at least {factor}; got {size}")
        return torch.stack([to_tensor(center_crop(picture, target)) for picture in pictures])
    sizes = sorted({(picture.height, picture.width) for picture in pictures})
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
        raise InvalidInputError(f"a batch needs images of one size; got {shown}: give size=")
    height, width = (side // factor * factor for side in sizes[0])
    if not height or not width:
        raise InvalidInputError(
            f"the image has {sizes[0][0]}x{sizes[0][1]} pixels; at least {factor}x{factor} are needed: give size="
        )
    left, top = (sizes[0][1] - width) // 2, (sizes[0][0] - height) // 2
    return torch.stack([to_tensor(picture.crop((left, top, left + width, top + height))) for picture in pictures])


def padded_picture(image: Image.Image | str | os.PathLike[str], factor: int) -> tuple[Tensor, tuple[int, int]]:
    """A picture of any size, padded by reflection at the right and below so that f divides its sides.

    Args:
        image: a picture or a path.
        factor: f.

    Returns:
        Its batch, float32 [1, 3, H, W] in [-1, 1] on the CPU, and its own (height, width).

    Raises:
        InvalidInputError: an unreadable picture.
    """
    pixels = to_tensor(open_image(image)).unsqueeze(0)
    height, width = pixels.shape[-2:]
    right, below = -width % factor, -height % factor
    reflect = right < width and below < height
    return F.pad(pixels, (0, right, 0, below), mode="reflect" if reflect else "replicate"), (height, width)


def postprocess_images(images: Tensor, output_type: str, to_uint8: Callable[[Tensor], Tensor]) -> Any:
    """Images [B, 3, H, W] in [-1, 1] to pictures; values outside the range are clamped.

    Args:
        images: output of a decoder.
        output_type: `"pil"` (list of pictures), `"uint8"` (tensor [B, H, W, 3]), `"np"` (float [B, H, W, 3] in [0, 1])
            or `"pt"` (float [B, 3, H, W] in [0, 1]).
        to_uint8: the rounding of the authors' evaluation, [B, 3, H, W] -> uint8 [B, H, W, 3].

    Raises:
        InvalidInputError: unknown output type.
        InvalidOutputError: if there are NaNs.
    """
    images = images.detach()
    if not bool(torch.isfinite(images).all()):
        raise InvalidOutputError("the decoded images contain NaN or infinite pixels: check the model's weights")
    if output_type == "pil":
        return [Image.fromarray(pixels) for pixels in to_uint8(images).cpu().numpy()]
    if output_type == "uint8":
        return to_uint8(images)
    scaled = (images.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return scaled
    if output_type == "np":
        return scaled.permute(0, 2, 3, 1).cpu().numpy()
    raise InvalidInputError(f"output_type must be 'pil', 'np', 'pt' or 'uint8'; got {output_type!r}")
