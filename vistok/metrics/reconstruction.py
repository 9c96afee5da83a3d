"""How close a reconstruction is to its original: PSNR and SSIM, one figure an image.

Shape letters: B images, H rows and W columns of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vistok.errors import InvalidInputError, InvalidOutputError, require

__all__ = ["psnr", "ssim"]

DATA_RANGE = 2.0  # images run from -1 to 1


def _checked(images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != targets.shape:
        raise InvalidInputError(
            f"images and targets must both be [B, C, H, W] of one shape; got {list(images.shape)} and "
            f"{list(targets.shape)}"
        )
    if not images.isfinite().all():
        raise InvalidOutputError("the reconstructions contain NaN or infinite pixels: PSNR and SSIM are undefined")
    # A saved picture cannot leave the range, so overshoot of a decoder is cut before it is judged.
    return images.float().clamp(-1, 1), targets.to(images.device).float().clamp(-1, 1)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(range^2 / mean squared error).

    Args:
        images: [B, C, H, W] in [-1, 1]; values outside are clamped first.
        targets: the originals, same shape.

    Returns:
        float32 [B]; infinite for identical images.

    Raises:
        InvalidInputError: on differing shapes.
        InvalidOutputError: on NaN or infinite pixels.
    """
    images, targets = _checked(images, targets)
    error = (images - targets).square().flatten(1).mean(1)
    return 10 * torch.log10(DATA_RANGE**2 / error)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5).

    Args:
        images: [B, C, H, W] in [-1, 1]; values outside are clamped first. H and W at least 11.
        targets: the originals, same shape.

    Returns:
        float32 [B], 1 for identical images.

    Raises:
        InvalidInputError: on differing or too small shapes.
        InvalidOutputError: on NaN or infinite pixels.
        MissingExtraError: without torchmetrics (extra `eval`).
    """
    images, targets = _checked(images, targets)
    if min(images.shape[-2:]) < 11:
        raise InvalidInputError(f"SSIM needs images of at least 11x11 pixels; got {list(images.shape)}")
    functional = require("torchmetrics.functional.image", "eval")
    # The luminance term compares means and is not shift-invariant: it is defined on [0, 1].
    values = functional.structural_similarity_index_measure(
        (images + 1) / 2, (targets + 1) / 2, data_range=1.0, reduction="none", sigma=1.5, kernel_size=11
    )
    return values.reshape(images.shape[0])
