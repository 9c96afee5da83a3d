"""Small generators with random heads, and conditions for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vistok.nn.llama import ConditionalLlama
from vistok.nn.text import TextCondition

TEXT = {"num_classes": None, "caption_dim": 12, "num_condition_tokens": 6}


def build(cls: type[ConditionalLlama], *, text: bool = False, **overrides: Any) -> Any:
    """A tiny model whose heads are not zero, so that logits differ."""
    torch.manual_seed(0)
    model = cls.tiny(**{**(TEXT if text else {}), **overrides})
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3 if "output" in name else 0.15)
    return model


def captions(*lengths: int, seed: int = 0) -> TextCondition:
    """Left-padded random features of captions with these lengths; the i-th depends on i alone."""
    features = torch.stack([torch.randn(6, 12, generator=torch.Generator().manual_seed(seed + i)) for i in lengths])
    mask = torch.arange(6) >= 6 - torch.tensor(lengths)[:, None]
    return TextCondition(features * mask[..., None], mask)


def condition_for(model: ConditionalLlama, count: int = 3) -> Tensor | TextCondition:
    """Different classes, or captions of different lengths."""
    return captions(*[4, 6, 2, 5][:count]) if model.is_text_conditional else torch.tensor([3, 0, 9, 3])[:count]


def seeds(*numbers: int) -> list[torch.Generator]:
    """One generator an image."""
    return [torch.Generator().manual_seed(number) for number in numbers]
