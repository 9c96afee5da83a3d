"""How many ordered tokens an image needs: the shortest prefix whose reconstruction is good enough.

Letters: B images, H, W pixels, N registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vistok.errors import InvalidInputError
from vistok.nn.sampling import Generators
from vistok.tokens import VisualTokens

from .inputs import check_length

if TYPE_CHECKING:
    from .model import FlexTok

__all__ = ["TokenBudget", "choose_lengths"]


@dataclass(frozen=True)
class TokenBudget:
    """Result of `FlexTok.tokens_for`.

    Attributes:
        tokens: ids [B, longest] with a mask: the chosen prefix of each image.
        lengths: int64 [B], tokens of each image.
        errors: float [B], the error at that length.
        satisfied: bool [B], whether that is within the bound (False: even all tokens were not enough).
    """

    tokens: VisualTokens
    lengths: Tensor
    errors: Tensor
    satisfied: Tensor


@torch.no_grad()
def choose_lengths(
    model: FlexTok,
    images: Tensor,
    max_error: float,
    *,
    lengths: Iterable[int] | None,
    error: Callable[[Tensor, Tensor], Tensor] | None,
    generator: Generators,
    **sampling: Any,
) -> TokenBudget:
    """`FlexTok.tokens_for`, which documents the arguments."""
    if not 0 < max_error < math.inf:
        raise InvalidInputError(f"max_error must be a positive number; got {max_error}")
    total = model.num_registers
    powers = {1 << power for power in range(total.bit_length())} | {total}
    tried = sorted({check_length(int(length), total) for length in (powers if lengths is None else lengths)})
    if not tried:
        raise InvalidInputError("lengths is empty: give at least one number of tokens to try")
    images = images.to(model.device)
    tokens = model.encode(images, tried[-1])
    assert tokens.ids is not None
    size = (images.shape[-2], images.shape[-1])
    noise = model.draw_noise(len(images), size, generator)
    measure = pixel_error if error is None else error
    chosen = torch.full((len(images),), tried[-1], device=model.device)
    errors = torch.full((len(images),), math.inf, device=model.device)
    open_ = torch.arange(len(images), device=model.device)
    for length in tried:
        decoded = model.decode(
            VisualTokens(ids=tokens.ids[open_, :length]), noise=noise[open_], image_size=size, **sampling
        )
        found = measure(decoded, images[open_]).float()
        errors[open_], chosen[open_] = found, length
        open_ = open_[found > max_error]
        if not len(open_):
            break
    longest = int(chosen.max())
    mask = torch.arange(longest, device=model.device) < chosen[:, None]
    kept = torch.where(mask, tokens.ids[:, :longest], 0)
    return TokenBudget(VisualTokens(ids=kept, mask=mask), chosen, errors, errors <= max_error)


def pixel_error(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean squared error [B] of pixels in [0, 1]."""
    return ((reconstructions.clamp(-1, 1) - images).float() / 2).square().flatten(1).mean(1)
