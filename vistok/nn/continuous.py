"""What generators of continuous tokens share: the tokens to start from, the check that new ones are numbers, and what
their published checkpoints have in common.

Letters: B images, N tokens of an image, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError, InvalidOutputError
from vistok.registry import Published
from vistok.tokens import VisualTokens

__all__ = ["FiniteCheck", "imagenet_checkpoint", "known_values"]


def imagenet_checkpoint(system: str, size: str, config: Mapping[str, Any], **facts: Any) -> Published:
    """The entry of a generator of KL-16 tokens of ImageNet 256.

    Args:
        system: key of the registry.
        size: "b", "l" or "h".
        config: arguments of the constructor, without the scale of the latents.
        facts: the fields of `Published` in which the papers differ.
    """
    return Published(
        name=f"{system}-{size}.imagenet256",
        system=system,
        config={**config, "scaling_factor": 0.2325},
        image_size=256,
        num_tokens=256,
        preprocessing="ADM centre crop, [-1, 1]",
        tokenizer="kl16.mar",
        **facts,
    )


def known_values(
    prefix: VisualTokens | None, batch: int, grid: tuple[int, int], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What an inpainting starts from.

    Args:
        prefix: tokens with features on the grid itself or on a smaller one, which is placed in the top left corner; its
            mask is True at the known ones (without a mask, all are).
        batch: B, images to write.
        grid: (rows, cols) to write.
        channels: C.
        device: of the features.

    Returns:
        features float32 [B, N, C], 0 where unknown, and known bool [B, N] on the CPU.

    Raises:
        InvalidInputError: if the prefix does not fit.
    """
    rows, cols = grid
    features = torch.zeros(batch, rows, cols, channels, device=device)
    known = torch.zeros(batch, rows, cols, dtype=torch.bool)
    if prefix is None:
        return features.flatten(1, 2), known.flatten(1)
    if prefix.features is None or prefix.grid is None or len(prefix) != batch:
        raise InvalidInputError(
            f"prefix must hold features of {batch} images with a grid; got {len(prefix)} images, features "
            f"{'missing' if prefix.features is None else 'given'}, grid {prefix.grid}"
        )
    high, wide = prefix.grid
    if high > rows or wide > cols or prefix.features.shape[2] != channels:
        raise InvalidInputError(
            f"the prefix has {high}x{wide} tokens of {prefix.features.shape[2]} channels; expected at most "
            f"{rows}x{cols} tokens of {channels}"
        )
    given = torch.ones(prefix.shape, dtype=torch.bool) if prefix.mask is None else prefix.mask.cpu()
    values = torch.where(given[..., None].to(device), prefix.features.to(device).float(), 0.0)
    if not bool(torch.isfinite(values).all()):
        raise InvalidInputError("the prefix contains NaN or infinity")
    known[:, :high, :wide] = given.view(batch, high, wide)
    features[:, :high, :wide] = values.view(batch, high, wide, channels)
    return features.flatten(1, 2), known.flatten(1)


class FiniteCheck:
    """Asks whether the tokens of a sampling run are numbers; with CUDA only once, so that no step waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.damaged = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, values: Tensor, *, last: bool) -> None:
        """Look at new tokens.

        Raises:
            InvalidOutputError: at the first value that is no number; with CUDA when `last` tokens come.
        """
        self.damaged |= ~torch.isfinite(values).all()
        if (last or not values.is_cuda) and bool(self.damaged):
            raise InvalidOutputError(
                "the model produced NaN or infinite tokens; its weights are damaged or its floating point type is too "
                "narrow: reload the checkpoint, or load it with dtype=torch.float32"
            )
