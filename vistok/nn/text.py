"""Text conditions: features of captions as generators take them.

Letters: B captions, T tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vistok.errors import InvalidInputError

__all__ = ["TextCondition", "left_pad"]


def left_pad(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each caption's valid prefix to the end and zero the rest, as LlamaGen and NAR were trained.

    Args:
        features: [B, T, D], valid tokens first.
        mask: [B, T], nonzero where valid.

    Returns:
        features [B, T, D] and bool mask [B, T], valid tokens last.
    """
    mask = mask.bool()
    lengths = mask.sum(1)
    total = mask.shape[1]
    source = (torch.arange(total, device=mask.device) - (total - lengths)[:, None]) % total
    moved = features.gather(1, source[..., None].expand(-1, -1, features.shape[-1]))
    flipped = mask.flip(1)
    return moved * flipped[..., None], flipped


@dataclass(frozen=True)
class TextCondition:
    """Features of a batch of captions, left-padded.

    Attributes:
        features: float [B, T, D].
        mask: bool [B, T], True at valid tokens, which end each row; None if all are valid.
    """

    features: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or not self.features.is_floating_point():
            raise InvalidInputError(
                f"text features must be floating point [B, T, D]; got {self.features.dtype} {list(self.features.shape)}"
            )
        if self.mask is not None and (
            self.mask.dtype != torch.bool or tuple(self.mask.shape) != tuple(self.features.shape[:2])
        ):
            raise InvalidInputError(
                f"text mask must be bool {list(self.features.shape[:2])}; got {self.mask.dtype} {list(self.mask.shape)}"
            )

    def __len__(self) -> int:
        """Number of captions, B."""
        return self.features.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextCondition:
        """Move the features (and cast them) and the mask."""
        mask = None if self.mask is None else self.mask.to(device=device)
        return TextCondition(self.features.to(device=device, dtype=dtype), mask)

    def repeat_interleave(self, repeats: int) -> TextCondition:
        """Each caption `repeats` times in a row."""
        mask = None if self.mask is None else self.mask.repeat_interleave(repeats, 0)
        return TextCondition(self.features.repeat_interleave(repeats, 0), mask)
