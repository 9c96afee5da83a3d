"""Small generators of continuous tokens with weights that matter, and conditions for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistok.nn.text import TextCondition

TEXT = {"num_classes": None, "caption_dim": 12}
# No step near pure noise, where random heads blow up.
GENTLE = "3,3,2,0"


def build(cls: Any, *, text: bool = False, **overrides: Any) -> Any:
    """A tiny model in which nothing is zero, so that every input changes the output."""
    torch.manual_seed(0)
    model = cls.tiny(**{**(TEXT if text else {}), "num_diffusion_steps": GENTLE, **overrides})
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.4 if "embed" in name or "token" in name or "latent" in name else 0.15)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def condition_for(model: Any, count: int = 3, seed: int = 0) -> Tensor | TextCondition:
    """Different classes, or captions of different lengths; the i-th depends on i alone."""
    if not model.is_text_conditional:
        return torch.tensor([3, 0, 9, 3])[:count]
    total = model.num_condition_tokens
    draws = [torch.Generator().manual_seed(seed + number) for number in range(count)]
    features = torch.stack([torch.randn(total, model.caption_dim, generator=one) for one in draws])
    lengths = torch.arange(count)[:, None] % total + 1
    mask = torch.arange(total) >= total - lengths
    return TextCondition(features * mask[..., None], mask)


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator an image."""
    return [torch.Generator().manual_seed(number) for number in numbers]
